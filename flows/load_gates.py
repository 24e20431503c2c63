"""The gates of a dataset: `flows/gates/default.yaml`, changed by the dataset's own file where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from data.card import DatasetCard, did_you_mean
from flows.experiment import read_mapping, readable_errors
from tracking.promotion import Gates

GATES = Path(__file__).parent / "gates"
DEFAULT = "default.yaml"


class BadGates(ValueError):
    """Gates with unknown keys, names or impossible values; the message lists all of them."""


def load_gates(card: DatasetCard, folder: Path = GATES) -> Gates:
    """The gates of the card's dataset.

    Raises:
        BadGates: a file is no YAML, or has unknown keys or classes or impossible values.
    """
    own = folder / f"{card.name}.yaml"
    path = own if own.is_file() else folder / DEFAULT
    content = read_mapping(folder / DEFAULT, BadGates) | (read_mapping(own, BadGates) if own.is_file() else {})
    # What the card says is no gate.
    keys = sorted(Gates.model_fields.keys() - {"protocol"})
    known = {key: value for key, value in content.items() if key in keys}
    problems = _unknown("key", content, keys)
    protocol = protocol_of(card.protocol, known.get("max_dets"), card.ignore_rule)
    try:
        gates = Gates.model_validate(known | {"protocol": protocol})
    except ValidationError as error:
        problems += readable_errors(error, Gates)
    else:
        problems += _unknown("class_floors", gates.class_floors, card.classes)
    if problems:
        raise BadGates(f"{path}:\n" + "\n".join(problems))
    return gates


def require_metrics(gates: Gates, metrics: Mapping[str, object]) -> None:
    """Raise BadGates unless all metrics that the gates name are among those of a score."""
    problems = [*_unknown("metric", [gates.metric], metrics)]
    problems += [*_unknown("floors", gates.floors, metrics), *_unknown("max_drop", gates.max_drop, metrics)]
    if problems:
        raise BadGates("the gates name what this dataset's scores do not have:\n" + "\n".join(problems))


def protocol_of(protocol: str, max_dets: object, ignore_rule: str) -> str:
    """What two scores must have in common to compare, as one text."""
    return f"{protocol} max_dets={max_dets} ignore_rule={ignore_rule}"


def _unknown(key: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    return [
        f"  {key}: {name!r} is not known.{did_you_mean(name, known)} Known: {', '.join(known)}"
        for name in names
        if name not in known
    ]

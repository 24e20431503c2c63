"""`DatasetCard`: what a person must know about a dataset before a number from it means anything."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data.splits import SplitRule
from data.tiling import Tiling

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]*$"
CATALOG = Path(__file__).parent / "catalog"


class UnknownDataset(LookupError):
    """No card of that name in the catalogue."""


class InvalidCard(ValueError):
    """A card that breaks the rules; the message lists every fault as `file: key: rule`."""


class DatasetCard(BaseModel):
    """One dataset of `data/catalog/<name>.yaml`.

    `classes` are in label order: label i (0-based) is category id i+1 of the prepared COCO files.
    `ignore_rule`: what happens to boxes in ignore regions when scoring: `none`, or
    `covered-half` (dropped when at least half of their own area lies in the union of the regions).
    `sources` says where the data was published. `splits`: see `SplitRule`.
    `tiling`: cut the training pictures into tiles. Those of val and test stay whole, so that a score means what it
    means elsewhere; unless `scoring.tiling` says otherwise they are scored by tiles of the same size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    description: str
    licence: str
    format: Literal["procedural", "coco", "voc", "yolo", "visdrone", "uavdt"]
    source: str
    # These, `splits` and `tiling`: left out where there is nothing to say, so that cards, and with `tiling` the keys of
    # runs, stay what they were before there were such fields.
    sources: tuple[str, ...] = Field((), exclude_if=lambda sources: not sources)
    classes: tuple[str, ...] = Field(min_length=1)
    protocol: Literal["coco", "voc", "visdrone", "uavdt", "aitod"] = "coco"
    ignore_rule: Literal["none", "covered-half"] = "none"
    splits: SplitRule = Field(SplitRule(), exclude_if=lambda rule: rule == SplitRule())
    tiling: Tiling | None = Field(None, exclude_if=lambda tiling: tiling is None)

    @field_validator("source", "sources")
    @classmethod
    def _without_password(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        # Cards travel with runs and models, to everybody who may read those.
        if any(re.search(r"://[^/\s]*@", text) for text in ((value,) if isinstance(value, str) else value)):
            raise ValueError("an address must not hold a user or password. Leave them out, and give them to the client")
        return value

    @field_validator("classes")
    @classmethod
    def _unique(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) != len(classes):
            raise ValueError(f"class names must be unique, got {list(classes)}")
        return classes


def card_names(catalog: Path = CATALOG) -> list[str]:
    """Names of all cards, sorted."""
    return sorted(path.stem for path in catalog.glob("*.yaml"))


def load_card(name: str, catalog: Path = CATALOG) -> DatasetCard:
    """Read `<catalog>/<name>.yaml`.

    Raises:
        UnknownDataset: there is no such card.
        InvalidCard: it is not YAML, or keys are missing, unknown or have wrong values.
    """
    known = card_names(catalog)
    if name not in known:
        raise UnknownDataset(
            f"dataset {name!r} is not known.{did_you_mean(name, known)} "
            f"Known: {', '.join(known) or 'none'}. Add one with `speck data import`."
        )
    path = catalog / f"{name}.yaml"
    try:
        card = DatasetCard.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidCard(f"{path}: not YAML: {error}") from error
    except ValidationError as error:
        raise InvalidCard("\n".join(f"{path}: {fault}" for fault in faults(error))) from error
    if card.name != name:
        raise InvalidCard(f"{path}: name: is {card.name!r}, must equal the file's name {name!r}")
    return card


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?`, or nothing when no known name comes near."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def faults(error: ValidationError) -> list[str]:
    """Return one `key: rule` per error of a card."""
    faults = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"]) or "card"
        if detail["type"] == "extra_forbidden":
            known = (Tiling if detail["loc"][0] == "tiling" else DatasetCard).model_fields
            hint = did_you_mean(str(detail["loc"][-1]), known)
            faults.append(f"{key}: unknown key.{hint} Known: {', '.join(known)}")
        elif detail["type"] == "missing":
            faults.append(f"{key}: this key is required")
        else:
            faults.append(f"{key}: {detail['msg']}, got {detail['input']!r}")
    return faults

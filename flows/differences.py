"""In what two finished runs differ beside their scores: parameters, data, code, cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from data.card import DatasetCard
from flows.record import flat, flat_params
from flows.settings import Settings
from training.ledger import read_ledger
from training.records import RunResult, attempt_folder, read_attempt

# Of a card, what only names or explains.
_WORDS = {"schema_version", "name", "description", "licence", "sources"}
ABSENT = "-"


class Fact(NamedTuple):
    """What one thing is in each of two runs, as text."""

    name: str
    first: str
    second: str


def differences(first: RunResult, second: RunResult, settings: Settings) -> dict[str, list[Fact]]:
    """Facts by kind: parameters, those that differ; data and code, with what the card has else; cost."""
    runs = (first, second)
    params = _facts(*(flat_params(run.spec) for run in runs), only_differing=True)
    cards = _facts(*(_card(run.spec.dataset.card) for run in runs), only_differing=True)
    return {
        "parameters": params,
        "data": [*_facts(*(_data(run) for run in runs)), *cards],
        "code": _facts(*(_code(run, settings) for run in runs)),
        "cost": _facts(*(_cost(run, settings) for run in runs)),
    }


def _facts(one: Mapping[str, str], two: Mapping[str, str], *, only_differing: bool = False) -> list[Fact]:
    facts = [Fact(name, one.get(name, ABSENT), two.get(name, ABSENT)) for name in dict(one) | dict(two)]
    return [fact for fact in facts if not only_differing or fact.first != fact.second]


def _card(card: DatasetCard) -> dict[str, str]:
    content = {key: value for key, value in card.model_dump(mode="json").items() if key not in _WORDS}
    return {name: str(value) for name, value in flat(content, "card.")}


def _data(run: RunResult) -> dict[str, str]:
    images = {split: f"{score.counts['num_images']:,}" for split, score in run.scores.items()}
    return {"version": run.spec.dataset.version} | {f"images of {split}": count for split, count in images.items()}


def _code(run: RunResult, settings: Settings) -> dict[str, str]:
    folder = settings.storage / run.run_key
    facts = {"training code": run.code_hash, "scoring": run.scores["test"].score_key}
    try:
        told = read_attempt(folder, run.attempts).provenance
    except (FileNotFoundError, ValueError):
        return facts
    commit = told.get("mlflow.source.git.commit", "unknown")
    dirty = {"True": " with changes", "False": ""}.get(told.get("speck.dirty", ""), ", changed or not is unknown")
    where = f" ({attempt_folder(run.attempts)}/dirty.diff)" if told.get("speck.dirty") == "True" else ""
    return {"commit": f"{commit[:12]}{dirty}{where}"} | facts


def _cost(run: RunResult, settings: Settings) -> dict[str, str]:
    facts = {"attempts": str(run.attempts), "from submission to result": f"{run.seconds['job'] / 60:.1f} min"}
    ledger = read_ledger(settings.storage / run.run_key)
    if ledger is None:
        return facts
    total = ledger.total
    facts |= {
        f"{ledger.accelerator} hours held": f"{total.held_s / 3600:.3f}",
        "of them useful": f"{total.useful_share:.0%}",
        "starts of workers": str(total.num_starts),
    }
    return facts if total.price is None else facts | {"price": f"{total.price:.2f}"}

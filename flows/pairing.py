"""Which two finished runs of a dataset a comparison is about, where nobody says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from data.card import load_card
from evaluation.significance import NotComparable
from flows.compare import ScoredSplit, require_same_rules
from flows.decisions import champion_of
from flows.evaluate import UnknownRun, find_result
from flows.settings import Settings
from tracking.client import connect, database
from tracking.runs import TRAINING
from training.records import RunResult, training_id


class Pair(NamedTuple):
    """Two runs, and why these."""

    first: RunResult
    second: RunResult
    why: str


def pair_of(dataset: str, settings: Settings, split: ScoredSplit) -> Pair:
    """The champion and the best other run by val, or where there is no champion the best two, the best one second.

    Only runs that compare are looked at: with the champion, or with the one that finished last.

    Raises:
        UnknownDataset: there is none of this name.
        UnknownRun: fewer than two finished runs, or the champion's is not in storage.
        NotComparable: none of the others was scored as the first.
        TrackingUnavailable: nobody can say which run is champion.
        CorruptResult: files of one of the two are missing or damaged.
    """
    runs = sorted(_finished(dataset, settings), key=_val_ap, reverse=True)
    if not runs:
        load_card(dataset)
    if len(runs) < 2:
        raise UnknownRun(f"{dataset!r} has {len(runs)} finished runs, and two are needed; train with `speck train`")
    holder = _champion(dataset, settings)
    if holder is None:
        latest = max(runs, key=lambda run: run.finished_ms)
        second, first = _alike(latest, runs, split)[:2]
        return _checked(first, second, settings, f"the best two of {dataset} by val; no champion is registered")
    reigning = next((run for run in runs if training_id(settings.storage / run.run_key) == holder), None)
    if reigning is None:
        raise UnknownRun(f"the champion of {dataset!r} is run {holder}, which is not in storage; name two runs instead")
    other = next(run for run in _alike(reigning, runs, split) if run.run_key != reigning.run_key)
    return _checked(reigning, other, settings, f"the champion of {dataset} and the best other run by val")


def _alike(run: RunResult, runs: list[RunResult], split: ScoredSplit) -> list[RunResult]:
    """Those that compare with a run, itself among them, in the same order. Raises NotComparable if that is all."""
    alike, refusal = [], ""
    for other in runs:
        try:
            require_same_rules(run, other, split)
            alike.append(other)
        except NotComparable as error:
            refusal = str(error)
    if len(alike) < 2:
        raise NotComparable(f"no other run compares with {run.run_key}. For example: {refusal}")
    return alike


def _finished(dataset: str, settings: Settings) -> Iterator[RunResult]:
    for path in settings.storage.glob("*/result.json"):
        with suppress(ValueError):
            result = RunResult.model_validate_json(path.read_bytes())
            if result.spec.dataset.name == dataset:
                yield result


def _checked(first: RunResult, second: RunResult, settings: Settings, why: str) -> Pair:
    """The pair, after the files of both were looked at: those of all runs would take long."""
    return Pair(find_result(first.run_key, settings), find_result(second.run_key, settings), why)


def _champion(dataset: str, settings: Settings) -> str | None:
    """The champion's training; None where there is no champion, or no registry yet."""
    if settings.mlflow_tracking_uri is None and not database(settings.tracking_uri).is_file():
        return None
    holder = champion_of(connect(settings.tracking_uri), settings, dataset)
    return None if holder is None else holder.tags.get(TRAINING, holder.run_key)


def _val_ap(run: RunResult) -> float:
    score = run.scores["val"].metrics["coco/AP"]
    return -1.0 if score is None else score

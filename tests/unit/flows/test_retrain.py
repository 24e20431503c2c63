"""What a retraining says that finds nothing to train; the flow itself runs in `test_deployment`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from promotions import NAME, load_gates_with

from flows.plan import PlannedCell
from flows.promote import Promotion, promote_best
from flows.promote_flow import tell
from flows.retrain import settled, unchanged
from flows.settings import Settings
from tracking.client import connect
from training.records import RunResult

Finish = Callable[..., RunResult]


@pytest.mark.parametrize(("count", "cells"), [(0, "0 cells"), (1, "1 cell"), (2, "2 cells")])
def test_it_counts_as_people_do(count: int, cells: str) -> None:
    assert unchanged(count, "apples unchanged, version 1", []) == (
        f"Nothing to do for {cells}: apples unchanged, version 1"
    )


@pytest.mark.slow
def test_it_says_whose_approval_is_awaited_and_how_to_give_it(
    finish: Finish, promote: Callable[..., Promotion], home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finish(0, 0.5)
    work: Any = SimpleNamespace(
        unplanned={}, planned=[PlannedCell(result.spec, "cached", "", result.code_hash)], settings=home
    )

    def challenge(_: str, results: Sequence[RunResult], settings: Settings) -> tuple[Promotion, None]:
        """Without Prefect's task around it."""
        return promote_best(connect(settings.tracking_uri), results, settings, lambda _: None), None

    monkeypatch.setattr("flows.retrain.challenge", challenge)
    monkeypatch.setattr("flows.promote.load_gates", lambda _: load_gates_with(approval=True))
    asked = settled(work)
    assert asked is not None
    assert unchanged(1, "as it was", asked) == (
        f"Nothing to do for 1 cell: as it was; {NAME}: {result.run_key} waits for approval: `speck promote {NAME} "
        f"--run {result.run_key} --approve`, or the deployment promote/default in Prefect"
    )
    assert promote(result).outcome == "promoted"
    decided = settled(work)
    assert decided is not None
    assert unchanged(1, "as it was", decided) == "Nothing to do for 1 cell: as it was"
    work.planned.append(PlannedCell(result.spec, "train", "", result.code_hash))
    assert settled(work) is None


def test_the_log_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("flows.promote_flow.say", said.append)
    tell(Promotion(NAME, "5f2c", 1, "waits for approval", "no worse; a person has to agree"))
    assert said == [
        f"{NAME}: version 1, waits for approval: no worse; a person has to agree",
        f"{NAME}: approve it by `speck promote {NAME} --run 5f2c --approve`, or the deployment promote/default in "
        "Prefect",
    ]

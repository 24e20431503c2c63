"""Which runs `speck compare DATASET` is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.card import UnknownDataset
from evaluation.significance import NotComparable
from flows.evaluate import UnknownRun
from flows.pairing import pair_of
from flows.settings import Settings
from tracking.client import connect
from tracking.registry import CHAMPION, move_alias, register
from tracking.runs import DatasetRef, ensure_run
from training.records import RunResult, write_result
from training.spec import RunSpec, ScoringSpec

Finish = Callable[..., str]
NAME = "tiny-squares"


@pytest.fixture
def finish(settings: Settings, make_result: Callable[..., RunResult]) -> Finish:
    def make(spec: RunSpec, val_ap: float | None, **changes: object) -> str:
        (settings.storage / spec.run_key).mkdir(parents=True)
        write_result(settings.storage / spec.run_key, make_result(spec, val_ap, 0.5, **changes))
        return spec.run_key

    return make


def crown(settings: Settings, run_key: str, folder: Path) -> None:
    """Make a run the dataset's champion."""
    client = connect(settings.tracking_uri)
    run_id = ensure_run(
        client, experiment=NAME, run_key=run_key, training_id=run_key, name="n", params={}, tags={},
        dataset=DatasetRef(NAME, "0" * 32, "s", {"test": 1}), start_time_ms=1,
    )  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "spec.json").write_text("{}")
    version = register(
        client, model_name=NAME, run_id=run_id, run_key=run_key, model_folder=folder / "model", tags={}, scores={}
    )
    move_alias(client, NAME, CHAMPION, version)


def test_without_a_champion_the_best_two_are_compared_the_better_second(
    settings: Settings, finish: Finish, cell_spec: Callable[..., RunSpec]
) -> None:
    keys = [finish(cell_spec(seed=seed), ap) for seed, ap in enumerate((0.25, 0.75, None, 0.5))]
    finish(cell_spec(dataset="other"), 1.0)
    pair = pair_of(NAME, settings, "test")
    assert (pair.first.run_key, pair.second.run_key) == (keys[3], keys[1])
    assert pair.why == f"the best two of {NAME} by val; no champion is registered"


def test_the_champion_is_compared_with_the_best_other_one(
    settings: Settings, finish: Finish, cell_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    keys = [finish(cell_spec(seed=seed), ap) for seed, ap in enumerate((0.25, 0.75, 0.5))]
    crown(settings, keys[0], tmp_path)
    pair = pair_of(NAME, settings, "test")
    assert (pair.first.run_key, pair.second.run_key) == (keys[0], keys[1])
    assert pair.why == f"the champion of {NAME} and the best other run by val"


def test_runs_of_another_version_are_passed_over_and_told_when_nothing_else_is_left(
    settings: Settings, finish: Finish, cell_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = cell_spec()
    newer = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"version": "f" * 32})})
    old = finish(spec, 0.25)
    new = [finish(newer.model_copy(update={"seed": seed}), ap, finished_ms=2_000) for seed, ap in ((1, 0.9), (2, 0.8))]
    assert pair_of(NAME, settings, "test") == pair_of(NAME, settings, "val")
    assert [run.run_key for run in pair_of(NAME, settings, "test")[:2]] == new[::-1], "those of the latest version"
    crown(settings, old, tmp_path)
    with pytest.raises(NotComparable, match=f"no other run compares with {old}.*{'f' * 32}"):
        pair_of(NAME, settings, "test")
    other = finish(cell_spec(seed=5), 0.1)
    assert [run.run_key for run in pair_of(NAME, settings, "test")[:2]] == [old, other]
    finish(cell_spec(seed=6).model_copy(update={"scoring": ScoringSpec(max_dets=500)}), 0.95)
    assert pair_of(NAME, settings, "test").second.run_key == other


def test_what_is_missing_is_told(
    settings: Settings, finish: Finish, cell_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    with pytest.raises(UnknownDataset, match="sample-aerial"):
        pair_of("sample-aeriel", settings, "test")
    finish(cell_spec(seed=1), 0.5)
    with pytest.raises(UnknownRun, match="1 finished runs, and two are needed"):
        pair_of(NAME, settings, "test")
    finish(cell_spec(seed=2), 0.5)
    crown(settings, "e" * 12, tmp_path)
    with pytest.raises(UnknownRun, match=f"the champion of '{NAME}' is run {'e' * 12}, which is not in storage"):
        pair_of(NAME, settings, "test")


def test_a_later_training_of_the_champion_s_run_is_not_taken_for_the_champion(
    settings: Settings, finish: Finish, cell_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    keys = [finish(cell_spec(seed=seed), ap) for seed, ap in enumerate((0.25, 0.75))]
    crown(settings, keys[0], tmp_path)
    # The first attempt that its folder knows is the second: the training that was promoted has been put aside.
    (settings.storage / keys[0] / "attempts").mkdir()
    (settings.storage / keys[0] / "attempts" / "002.json").write_text("{}")
    with pytest.raises(UnknownRun, match=f"the champion of '{NAME}' is run {keys[0]}, which is not in storage"):
        pair_of(NAME, settings, "test")

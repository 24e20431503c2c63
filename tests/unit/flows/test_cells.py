"""What is to be done for a cell, decided from what lies in storage alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flows.cells import plan_cell, run_cell
from flows.record import Recorder
from flows.settings import Settings
from training.checkpoint import save_checkpoint
from training.jobs import Jobs
from training.records import RESULT, RunResult, hash_files, record_attempt, write_result
from training.spec import RunSpec


def checkpoint(folder: Path, spec: RunSpec, epoch: int) -> Path:
    tensors = {"model": {"weight": torch.full((2,), float(epoch))}}
    save_checkpoint(folder, run_key=spec.run_key, step=6 * epoch, epoch=epoch, tensors=tensors, state={"epoch": epoch})
    return folder


@pytest.fixture
def spec(cell_spec: Callable[..., RunSpec]) -> RunSpec:
    return cell_spec()


@pytest.fixture
def run_folder(settings: Settings, spec: RunSpec) -> Path:
    return settings.storage / spec.run_key


@pytest.fixture
def finished(run_folder: Path, spec: RunSpec, make_result: Callable[..., RunResult], settings: Settings) -> RunResult:
    (run_folder / "artifacts").mkdir(parents=True)
    (run_folder / "artifacts" / "weights.safetensors").write_bytes(b"weights")
    code_hash = plan_cell(spec, settings).code_hash
    result = make_result(spec, 0.25, 0.5, files=hash_files(run_folder, run_folder / "artifacts"), code_hash=code_hash)
    write_result(run_folder, result)
    return result


def test_what_was_never_trained_is_trained_and_planning_leaves_no_trace(settings: Settings, spec: RunSpec) -> None:
    planned = plan_cell(spec, settings)
    assert (planned.state, planned.spec) == ("train", spec)
    assert not settings.home.exists()


def test_the_newest_whole_checkpoint_says_where_to_go_on(settings: Settings, spec: RunSpec, run_folder: Path) -> None:
    for epoch in (1, 2):
        checkpoint(run_folder / f"checkpoint_2026-01-0{epoch}", spec, epoch)
    assert plan_cell(spec, settings).why == "stopped after epoch 2 of 2"
    weights = run_folder / "checkpoint_2026-01-02" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    planned = plan_cell(spec, settings)
    assert (planned.state, planned.why) == ("resume", "stopped after epoch 1 of 2")
    (run_folder / "checkpoint_2026-01-01" / "manifest.json").unlink()
    assert plan_cell(spec, settings).state == "train"


def test_a_whole_result_is_all_there_is_to_do(settings: Settings, spec: RunSpec, finished: RunResult) -> None:
    planned = plan_cell(spec, settings)
    assert planned.state == "cached"
    assert "other code" not in planned.why


def test_other_scoring_rules_ask_for_a_score_and_no_training(
    settings: Settings, spec: RunSpec, finished: RunResult
) -> None:
    other = spec.model_copy(update={"scoring": spec.scoring.model_copy(update={"nms_iou": 0.3})})
    assert other.run_key == spec.run_key
    assert plan_cell(other, settings).state == "score"


def test_a_result_by_other_code_is_shown_as_such(
    settings: Settings, spec: RunSpec, run_folder: Path, finished: RunResult
) -> None:
    write_result(run_folder, finished.model_copy(update={"code_hash": "0ld"}))
    planned = plan_cell(spec, settings)
    assert planned.state == "cached"
    assert f"by other code (0ld, now {planned.code_hash})" in planned.why


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut off", "other schema"])
def test_a_damaged_result_is_made_again(
    settings: Settings, spec: RunSpec, run_folder: Path, finished: RunResult, damage: str
) -> None:
    weights, result = run_folder / "artifacts" / "weights.safetensors", run_folder / RESULT
    if damage == "flipped":
        weights.write_bytes(b"weighty")
    elif damage == "missing":
        weights.unlink()
    elif damage == "cut off":
        result.write_bytes(result.read_bytes()[:-20])
    else:
        result.write_text(result.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    planned = plan_cell(spec, settings)
    assert planned.state == "resume"
    assert planned.why.startswith("its result is damaged: ")


def test_other_runs_do_not_count(settings: Settings, spec: RunSpec, cell_spec: Callable[..., RunSpec]) -> None:
    other = cell_spec(seed=1)
    checkpoint(settings.storage / other.run_key / "checkpoint_2026-01-01", other, 1)
    assert plan_cell(other, settings).state == "resume"
    assert plan_cell(spec, settings).state == "train"


def test_a_finished_cell_needs_no_cluster_and_no_tracking_store(
    settings: Settings, spec: RunSpec, finished: RunResult
) -> None:
    def no_cluster() -> Jobs:
        raise AssertionError("a cluster was started for a finished cell")

    record_attempt(settings.storage / spec.run_key, spec, data_source="", code_hash="c")
    settings.home.joinpath("mlflow.db").write_text("no database")
    warnings: list[str] = []
    recorder = Recorder(settings.tracking_uri, None, warnings.append)
    outcome = run_cell(plan_cell(spec, settings), no_cluster, settings, recorder, warnings.append)
    assert (outcome.result, outcome.reused, outcome.run_id, outcome.seconds) == (finished, True, None, {})
    assert len(warnings) == 1

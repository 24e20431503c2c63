"""What is to be done for a cell, decided from what lies in storage alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flows.plan
from data.store import default_root
from data.summary import DatasetSummary
from evaluation.result import score_key
from flows.plan import OUTSIDE_JOB_S, OVERHEAD_S, PROBES, plan_cell, plan_cells
from flows.settings import Settings
from training.checkpoint import save_checkpoint
from training.probe import Probe
from training.records import RESULT, JournalEntry, RunResult, hash_files, record_attempt, write_entry, write_result
from training.scoring import score_options
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
        checkpoint(run_folder / "checkpoints" / f"0{epoch}", spec, epoch)
    assert plan_cell(spec, settings).why == "stopped after epoch 2 of 2"
    weights = run_folder / "checkpoints" / "02" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    planned = plan_cell(spec, settings)
    assert (planned.state, planned.why) == ("resume", "stopped after epoch 1 of 2")
    (run_folder / "checkpoints" / "01" / "manifest.json").unlink()
    assert plan_cell(spec, settings).state == "train"


def test_a_whole_result_is_all_there_is_to_do(settings: Settings, spec: RunSpec, finished: RunResult) -> None:
    planned = plan_cell(spec, settings)
    assert planned.state == "cached"
    assert "other code" not in planned.why


def test_a_result_is_whole_by_the_protocol_of_its_dataset(
    settings: Settings, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    spec = cell_spec()
    card = spec.dataset.card.model_copy(update={"protocol": "visdrone"})
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})
    result = make_result(spec, 0.25, 0.5, code_hash=plan_cell(spec, settings).code_hash)
    (settings.storage / spec.run_key).mkdir(parents=True)
    write_result(settings.storage / spec.run_key, result)
    assert plan_cell(spec, settings).state == "cached"
    by_coco = result.scores["test"].model_copy(update={"score_key": score_key("coco", score_options(spec))})
    changed = result.model_copy(update={"scores": result.scores | {"test": by_coco}})
    write_result(settings.storage / spec.run_key, changed)
    assert plan_cell(spec, settings).state == "score"


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
    assert planned.state == "stale"
    assert f"by other code (0ld, now {planned.code_hash})" in planned.why
    again = plan_cell(spec, settings, "retrain")
    assert (again.state, again.superseding) == ("train", True)


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
    assert planned.state == "train"
    assert planned.why.startswith("its result is damaged: ")


def test_other_runs_do_not_count(settings: Settings, spec: RunSpec, cell_spec: Callable[..., RunSpec]) -> None:
    other = cell_spec(seed=1)
    checkpoint(settings.storage / other.run_key / "checkpoints" / "01", other, 1)
    assert plan_cell(other, settings).state == "resume"
    assert plan_cell(spec, settings).state == "train"


def test_a_kind_of_cell_is_probed_once_a_day(
    settings: Settings, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = DatasetSummary("tiny-squares", "", {"train": 100, "val": 20, "test": 30}, None, None)
    monkeypatch.setattr(flows.plan, "summarise", lambda *_: counts)
    probed: list[int] = []

    def measure(spec: RunSpec) -> Probe:
        probed.append(spec.seed)
        return Probe(1.0, 0.5, 1000)

    monkeypatch.setattr(flows.plan, "probe", measure)
    specs = [spec, spec.model_copy(update={"seed": 5})]
    first = plan_cells(specs, settings)
    assert plan_cells(specs, settings) == first
    assert probed == [spec.seed]
    (kept,) = (default_root() / PROBES).iterdir()
    os.utime(kept, (0, 0))
    plan_cells(specs, settings)
    assert len(probed) == 2


def test_the_estimate_comes_from_a_probe_and_then_from_a_finished_run_of_its_kind(
    settings: Settings,
    cell_spec: Callable[..., RunSpec],
    make_result: Callable[..., RunResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = DatasetSummary("tiny-squares", "", {"train": 100, "val": 20, "test": 30}, None, None)
    monkeypatch.setattr(flows.plan, "summarise", lambda *_: counts)
    spec, other = cell_spec(), cell_spec(seed=1)
    (probed,) = plan_cells([spec], settings)
    assert probed.estimate is not None
    assert (probed.estimate.source, probed.estimate.seconds > OVERHEAD_S) == ("probe", True)

    # 2 epochs of 10 images at 4 images/s; 8 test images in 2 s; a job of 60 s of which 9 s were training and scoring.
    run_folder = settings.storage / other.run_key
    for step in (5, 10):
        metrics = {"train/images_per_s": 4.0, "time/train_s": 2.5, "time/validate_s": 1.0}
        write_entry(
            run_folder,
            JournalEntry(run_key=other.run_key, attempt=1, step=step, epoch=step // 5, timestamp_ms=1, seconds=3.5,
                         code_hash="c", metrics=metrics),
        )  # fmt: skip
    write_result(run_folder, make_result(other, 0.25, 0.5))
    (measured,) = plan_cells([spec], settings)
    assert measured.estimate is not None
    # 2 epochs x 100 images / 4, then two validations of 20 images and 30 test images at 0.25 s.
    overhead_s = 60 - 9 + OUTSIDE_JOB_S
    assert measured.estimate.seconds == pytest.approx(2 * 100 / 4 + (2 * 20 + 30) * 0.25 + overhead_s)
    assert measured.estimate.source == f"run {other.run_key}"
    assert measured.estimate.disk_bytes == sum(p.stat().st_size for p in run_folder.rglob("*") if p.is_file())

    checkpoint(settings.storage / spec.run_key / "checkpoints" / "01", spec, 1)
    (resumed,) = plan_cells([spec], settings)
    assert resumed.estimate is not None
    assert measured.estimate.seconds - resumed.estimate.seconds == pytest.approx(100 / 4 + 20 * 0.25)


def test_a_half_finished_run_of_other_code_is_said_to_be_one_and_put_aside_when_asked(
    settings: Settings, spec: RunSpec, run_folder: Path
) -> None:
    checkpoint(run_folder / "checkpoints" / "01", spec, 1)
    record_attempt(run_folder, spec, data_source="", code_hash="0ld")
    planned = plan_cell(spec, settings)
    assert (planned.state, planned.superseding) == ("resume", False)
    assert planned.why == f"stopped after epoch 1 of 2, trained by other code (0ld, now {planned.code_hash})"
    again = plan_cell(spec, settings, "retrain")
    assert (again.state, again.superseding) == ("train", True)


def test_an_architecture_that_does_not_run_is_planned_without_an_estimate(
    settings: Settings, cell_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(spec: RunSpec) -> None:
        if spec.architecture.name == "yolox-s":
            raise RuntimeError("out of memory")

    counts = DatasetSummary("tiny-squares", "", {"train": 100, "val": 20, "test": 30}, None, None)
    monkeypatch.setattr(flows.plan, "summarise", lambda *_: counts)
    monkeypatch.setattr(flows.plan, "probe", broken)
    planned = plan_cells([cell_spec("yolox-s"), cell_spec("yolox-nano")], settings)
    assert [(cell.state, cell.estimate) for cell in planned] == [("train", None), ("train", None)]

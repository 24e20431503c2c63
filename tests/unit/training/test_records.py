from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.result import ScoreOptions, ScoreResult
from training.checkpoint import save_checkpoint
from training.records import (
    RESULT,
    CorruptResult,
    Ending,
    JournalEntry,
    RunResult,
    complete_journal,
    entry_name,
    hash_files,
    journal_entry,
    read_attempt,
    read_ending,
    read_journal,
    read_result,
    record_attempt,
    split_finite,
    supersede,
    training_id,
    write_ending,
    write_entry,
    write_result,
)
from training.spec import RunSpec


def entry(step: int, *, attempt: int = 1, **changes: Any) -> JournalEntry:
    values = {"run_key": "a" * 12, "attempt": attempt, "step": step, "epoch": step // 6, "timestamp_ms": 1000 + step}
    values |= {"seconds": 1.5, "code_hash": "c" * 12, "metrics": {"train/loss": 1.0 / step}}
    return JournalEntry(**values | changes)


@pytest.fixture
def finished(tmp_path: Path, tiny_spec: Callable[..., RunSpec]) -> RunResult:
    """A run with two artifacts whose result is not yet written."""
    spec = tiny_spec()
    (tmp_path / "artifacts" / "plots").mkdir(parents=True)
    (tmp_path / "artifacts" / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "artifacts" / "plots" / "curve.png").write_bytes(b"curve")
    options = ScoreOptions(input_size_px=64, precision="fp32", ignore_rule="none", **spec.scoring.model_dump())
    score = ScoreResult(
        run_key=spec.run_key, score_key="b" * 12, protocol="coco", dataset_name="tiny-squares",
        dataset_version=spec.dataset.version, split="val", options=options,
        metrics={"coco/AP": 0.5, "coco/AP_large": None}, per_class={}, counts={"num_images": 8},
    )  # fmt: skip
    return RunResult(
        run_key=spec.run_key, spec=spec, scores={"val": score, "test": score.model_copy(update={"split": "test"})},
        files=hash_files(tmp_path, tmp_path / "artifacts"), attempts=2, seconds={"train": 1.0}, code_hash="c" * 12,
        finished_ms=1,
    )  # fmt: skip


def test_the_journal_is_read_by_step_whatever_the_order_of_writing(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    entries = [entry(6), entry(12), entry(18), entry(1_000_000_002), entry(2_000_000_004, attempt=2)]
    for index in (3, 1, 4, 0, 2):
        write_entry(tmp_path, entries[index])
    assert read_journal(tmp_path) == entries


@pytest.mark.parametrize("attempts", [(1, 2), (1, 1), (9, 10), (99, 100)])
def test_an_epoch_that_was_done_again_counts_as_first_reported(tmp_path: Path, attempts: tuple[int, int]) -> None:
    """Also within one attempt: the first report may be logged already, and a second timestamp would be a second row."""
    first, again = (entry(6, attempt=attempt, timestamp_ms=ms) for attempt, ms in zip(attempts, (1, 2), strict=True))
    write_entry(tmp_path, first)
    write_entry(tmp_path, again)
    write_entry(tmp_path, entry(12, attempt=attempts[1]))
    assert [(e.step, e.timestamp_ms) for e in read_journal(tmp_path)] == [(6, 1), (12, 1012)]


def test_what_an_interrupted_write_left_is_no_entry(tmp_path: Path) -> None:
    write_entry(tmp_path, entry(6))
    (tmp_path / entry_name(entry(12))).with_name(".001-000000012.json.partial").write_text('{"schema')
    assert read_journal(tmp_path) == [entry(6)]


def test_an_epoch_whose_entry_a_kill_prevented_is_taken_from_its_checkpoint(
    tmp_path: Path, tiny_spec: Callable[..., RunSpec]
) -> None:
    attempt = record_attempt(tmp_path, tiny_spec(), data_source="", code_hash="c" * 12)
    write_entry(tmp_path, entry(6))
    checkpoint = tmp_path / "checkpoint_2"
    checkpoint.mkdir()
    report = {"train/loss": 0.5, "time/train_s": 3.0, "step": 12, "epoch": 2, "timestamp_ms": 77}
    (checkpoint / "state.json").write_text(json.dumps({"report": report}))
    for _ in range(2):
        complete_journal(tmp_path, attempt, checkpoint)
    first, second = read_journal(tmp_path)
    assert first == entry(6)
    assert (second.step, second.epoch, second.timestamp_ms, second.seconds) == (12, 2, 77, 3.0)
    assert second.metrics == {"train/loss": 0.5, "time/train_s": 3.0}


def test_an_unreadable_entry_costs_one_epoch_of_the_log_not_the_run(tmp_path: Path) -> None:
    """A machine that loses power may leave an empty file behind a rename."""
    write_entry(tmp_path, entry(6))
    write_entry(tmp_path, entry(12))
    (tmp_path / entry_name(entry(12))).write_bytes(b"")
    write_entry(tmp_path, entry(18))
    with pytest.warns(UserWarning, match="001-000000012"):
        assert read_journal(tmp_path) == [entry(6), entry(18)]


def test_a_report_becomes_an_entry(tmp_path: Path, tiny_spec: Callable[..., RunSpec]) -> None:
    attempt = record_attempt(tmp_path, tiny_spec(), data_source="/data", code_hash="c" * 12)
    report = {"step": 6.0, "epoch": 1.0, "timestamp_ms": 5.0, "train/loss": 2.5, "val/coco/AP": float("nan")}
    report |= {"time/train_s": 1.5, "time/validate_s": 0.25}
    made = journal_entry(attempt, report)
    assert (made.run_key, made.attempt, made.step, made.epoch, made.timestamp_ms) == (attempt.run_key, 1, 6, 1, 5)
    assert made.metrics == {"train/loss": 2.5, "time/train_s": 1.5, "time/validate_s": 0.25}
    assert (made.seconds, made.non_finite) == (1.75, ("val/coco/AP",))
    assert report["step"] == 6.0


def test_an_epoch_whose_report_a_kill_lost_is_taken_from_its_checkpoint(
    tmp_path: Path, tiny_spec: Callable[..., RunSpec]
) -> None:
    attempt = record_attempt(tmp_path, tiny_spec(), data_source="/data", code_hash="c" * 12)
    report = {"step": 12.0, "epoch": 2.0, "timestamp_ms": 7.0, "train/loss": 2.5}
    checkpoint = tmp_path / "checkpoint_2"
    save_checkpoint(checkpoint, run_key=attempt.run_key, step=12, epoch=2, tensors={}, state={"report": report})
    write_entry(tmp_path, entry(6))
    for _ in range(2):
        complete_journal(tmp_path, attempt, checkpoint)
        assert read_journal(tmp_path) == [entry(6), journal_entry(attempt, report)]


def test_a_report_that_is_in_the_journal_stays_as_it_is(tmp_path: Path, tiny_spec: Callable[..., RunSpec]) -> None:
    record_attempt(tmp_path, tiny_spec(), data_source="/data", code_hash="c" * 12)
    attempt = record_attempt(tmp_path, tiny_spec(), data_source="/data", code_hash="d" * 12)
    report = {"step": 12.0, "epoch": 2.0, "timestamp_ms": 7.0, "train/loss": 9.5}
    for state in ({"report": report}, {"report": {}}):
        checkpoint = tmp_path / f"checkpoint_{len(state['report'])}"
        save_checkpoint(checkpoint, run_key=attempt.run_key, step=12, epoch=2, tensors={}, state=state)
        write_entry(tmp_path, entry(12))
        complete_journal(tmp_path, attempt, checkpoint)
    assert read_journal(tmp_path) == [entry(12)]


def test_values_that_are_not_finite_are_set_apart_by_name() -> None:
    metrics = {"b": float("nan"), "a": float("-inf"), "loss": 2, "lr": 0.5, "name": "text", "flag": True}
    assert split_finite(metrics) == ({"loss": 2.0, "lr": 0.5, "flag": 1.0}, ("a", "b"))


def test_attempts_are_numbered_and_name_their_job(tmp_path: Path, tiny_spec: Callable[..., RunSpec]) -> None:
    spec = tiny_spec()
    made = [record_attempt(tmp_path, spec, data_source="/data", code_hash="c" * 12) for _ in range(3)]
    assert [attempt.number for attempt in made] == [1, 2, 3]
    assert [attempt.submission_id for attempt in made] == [f"{spec.run_key}-{number}" for number in (1, 2, 3)]
    assert [read_attempt(tmp_path, number) for number in (1, 2, 3)] == made


def test_a_run_is_done_when_its_result_is_written(tmp_path: Path, finished: RunResult) -> None:
    assert set(finished.files) == {"artifacts/weights.safetensors", "artifacts/plots/curve.png"}
    assert read_result(tmp_path) is None
    write_result(tmp_path, finished)
    assert read_result(tmp_path) == finished


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_artifact_makes_the_result_corrupt(tmp_path: Path, finished: RunResult, damage: str) -> None:
    write_result(tmp_path, finished)
    path = tmp_path / "artifacts" / "plots" / "curve.png"
    content = path.read_bytes()
    path.write_bytes({"flip": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "remove": b""}[damage])
    if damage == "remove":
        path.unlink()
    with pytest.raises(CorruptResult, match=r"curve\.png is missing or differs"):
        read_result(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_result_cut_short_is_corrupt(tmp_path: Path, finished: RunResult, length: int) -> None:
    write_result(tmp_path, finished)
    path = tmp_path / RESULT
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptResult, match="delete"):
        read_result(tmp_path)


def test_a_result_with_a_number_that_is_none_is_not_written(tmp_path: Path, finished: RunResult) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_result(tmp_path, finished.model_copy(update={"seconds": {"train": float("nan")}}))
    assert read_result(tmp_path) is None


def test_hashes_are_those_of_the_bytes(finished: RunResult) -> None:
    """`printf weights | sha256sum`, and `curve`."""
    assert finished.files == {
        "artifacts/plots/curve.png": "80c1018a4c8f1d7fe7502bb5936f986b4cbe43cfe7e4dca7967aefb370518007",
        "artifacts/weights.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }


def test_how_an_attempt_ended_lies_beside_its_record_and_is_none_itself(
    tmp_path: Path, tiny_spec: Callable[..., RunSpec]
) -> None:
    folder, ending = tmp_path / "runs" / ("a" * 12), Ending(status="FAILED", cause="out of memory", ended_ms=5)
    for number in (1, 2):
        record_attempt(folder, tiny_spec(), data_source="", code_hash="c")
        assert write_ending(folder, number, ending) == f"attempts/00{number}/ending.json"
    assert read_ending(folder, 1) == read_ending(folder, 2) == ending
    assert read_ending(folder, 3) is None
    (folder / "attempts/001/ending.json").write_text("{")
    assert read_ending(folder, 1) is None
    assert record_attempt(folder, tiny_spec(), data_source="", code_hash="c").number == 3


def test_a_training_keeps_its_name_when_it_is_put_aside(tmp_path: Path, tiny_spec: Callable[..., RunSpec]) -> None:
    folder = tmp_path / "runs" / ("a" * 12)
    for name in ("a" * 12, f"{'a' * 12}.2"):
        record_attempt(folder, tiny_spec(), data_source="", code_hash="c")
        assert training_id(folder) == name
        assert training_id(supersede(folder)) == name

"""One cell of the matrix: what there is to do for it, doing it on the cluster, and recording it in MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

import models
from evaluation.result import score_key
from flows.evaluate import score_again
from flows.record import Recorder, provenance
from flows.settings import REPO, Settings
from training.checkpoint import CorruptCheckpoint, newest_first, verify_checkpoint
from training.code import training_code_hash
from training.jobs import CellFailed, Jobs, code_snapshot
from training.meter import PROGRESS_MARK
from training.records import (
    RESULT,
    CorruptResult,
    RunResult,
    read_attempt,
    read_journal,
    read_result,
    record_attempt,
)
from training.scoring import score_options
from training.spec import RunSpec

RECORD_EVERY_S = 5.0


@dataclass(frozen=True)
class PlannedCell:
    """A cell with what will happen to it, and why."""

    spec: RunSpec
    state: Literal["cached", "score", "resume", "train"]
    why: str
    code_hash: str


@dataclass(frozen=True)
class CellOutcome:
    """A finished cell. `seconds` tells training, scoring and the rest apart; all zero when nothing was trained."""

    result: RunResult
    run_id: str | None
    reused: bool
    seconds: dict[str, float]


def plan_cell(spec: RunSpec, settings: Settings) -> PlannedCell:
    """Decide from what lies in storage whether a cell is done, half done or new."""
    run_folder = settings.storage / spec.run_key
    code_hash = training_code_hash(REPO, models.ARCHITECTURES[spec.architecture.name].build.__module__)
    try:
        result = read_result(run_folder)
    except CorruptResult as error:
        return PlannedCell(spec, "resume", f"its result is damaged: {error}", code_hash)
    if result is not None and result.scores["test"].score_key != score_key("coco", score_options(spec)):
        return PlannedCell(spec, "score", "trained, but scored under other options or by other code", code_hash)
    if result is not None:
        stale = "" if result.code_hash == code_hash else f", by other code ({result.code_hash}, now {code_hash})"
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(result.finished_ms / 1000))
        return PlannedCell(spec, "cached", f"finished {day}{stale}", code_hash)
    for folder in newest_first(run_folder):
        try:
            manifest = verify_checkpoint(folder)
        except CorruptCheckpoint:
            continue
        return PlannedCell(spec, "resume", f"stopped after epoch {manifest.epoch} of {spec.training.epochs}", code_hash)
    return PlannedCell(spec, "train", "nothing was trained with this configuration and data", code_hash)


def run_cell(
    cell: PlannedCell, jobs: Callable[[], Jobs], settings: Settings, recorder: Recorder, say: Callable[[str], None]
) -> CellOutcome:
    """Bring a cell to its result, and its MLflow run up to date with it.

    Another flow on this machine that is at work on the same cell is waited for.

    Raises:
        CellFailed: the job ended without a result. What it had reached stays for the next attempt.
    """
    run_folder = settings.storage / cell.spec.run_key
    run_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run_folder / ".lock"):
        # What was planned may be done meanwhile.
        cell = plan_cell(cell.spec, settings)
        wall_s = _train(cell, jobs(), settings, recorder, say) if cell.state in {"train", "resume"} else None
        result = read_result(run_folder)
        if result is None:
            raise CellFailed(f"{run_folder / RESULT} is missing although the Ray job succeeded; run again")
        if cell.state == "score":
            say(f"scoring again: {cell.why}")
            result = score_again(result, cell.spec, settings)
    recorder.begin(read_attempt(run_folder, result.attempts))
    recorder.finish(run_folder, result)
    seconds = {} if wall_s is None else _breakdown(run_folder, result, wall_s)
    return CellOutcome(result, recorder.run_id, reused=wall_s is None, seconds=seconds)


def _train(cell: PlannedCell, jobs: Jobs, settings: Settings, recorder: Recorder, say: Callable[[str], None]) -> float:
    """Follow the cell's Ray job to its end, a living one or a new one, and return how long that took."""
    spec, run_folder = cell.spec, settings.storage / cell.spec.run_key
    started = time.monotonic()
    submission_id = jobs.living(spec.run_key)
    if submission_id is None:
        # A damaged result, or none: from here on the run counts as unfinished.
        (run_folder / RESULT).unlink(missing_ok=True)
        attempt = record_attempt(
            run_folder, spec, data_source=settings.data_source, code_hash=cell.code_hash, provenance=provenance()
        )
        with code_snapshot(REPO) as code:
            submission_id = jobs.submit(attempt, run_folder, code)
    else:
        attempt = read_attempt(run_folder, int(submission_id.rpartition("-")[2]))
        say(f"attaching to Ray job {submission_id}")
    recorder.begin(attempt)
    try:
        _follow(jobs, submission_id, recorder, run_folder, say)
    except CellFailed:
        recorder.fail(run_folder)
        raise
    return time.monotonic() - started


def _follow(jobs: Jobs, submission_id: str, recorder: Recorder, run_folder: Path, say: Callable[[str], None]) -> None:
    recorded = time.monotonic()

    def on_line(line: str) -> None:
        nonlocal recorded
        _, marked, text = line.partition(PROGRESS_MARK)
        if marked:
            say(text.strip())
        if time.monotonic() - recorded > RECORD_EVERY_S:
            recorder.sync(run_folder)
            recorded = time.monotonic()

    try:
        jobs.follow(submission_id, on_line, finished=(run_folder / RESULT).is_file)
    finally:
        recorder.sync(run_folder)


def _breakdown(run_folder: Path, result: RunResult, wall_s: float) -> dict[str, float]:
    entries = [entry for entry in read_journal(run_folder) if entry.attempt == result.attempts]
    training = sum(entry.metrics.get("time/train_s", 0.0) for entry in entries)
    scoring = sum(entry.metrics.get("time/validate_s", 0.0) for entry in entries) + result.seconds["score_test"]
    return {"wall": wall_s, "training": training, "scoring": scoring, "overhead": wall_s - training - scoring}

"""The two records a run leaves behind: the journal, object by object, and `result.json`, last."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from evaluation.result import ScoreResult
from training.checkpoint import file_sha256, json_bytes
from training.spec import RunSpec
from training.store import FolderStore, RunStore

RESULT = "result.json"
JOURNAL = "journal"
# In an attempt's folder: what its code was beside the commit, its data, its packages, and how it ended.
DIRTY_DIFF = "dirty.diff"
DATA_LOCK = "dvc.lock"
ENVIRONMENT = "environment.txt"
ENDING = "ending.json"


class JournalEntry(BaseModel):
    """One report of a run: what the workers measured up to `step`.

    `timestamp_ms` is fixed when the report is made, so that replaying it into a tracking server twice
    changes nothing. `metrics` are finite; names of values that were not are in `non_finite`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_key: str
    attempt: int
    step: int
    epoch: int
    timestamp_ms: int
    seconds: float
    code_hash: str
    metrics: dict[str, float]
    non_finite: tuple[str, ...] = ()


class Attempt(BaseModel):
    """One submission of a run to Ray: what it was asked to do, by which code.

    `data_source` is the DVC storage that nodes fetch the dataset version from; `provenance` says which commit, who and
    where, as tags of the MLflow run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_key: str
    number: int
    spec: RunSpec
    data_source: str
    code_hash: str
    submitted_ms: int
    provenance: dict[str, str] = Field(default_factory=dict)

    @property
    def submission_id(self) -> str:
        """Name of the Ray job. Ray accepts a name once only, even after a failure."""
        return f"{self.run_key}-{self.number}"


def record_attempt(
    run_folder: Path, spec: RunSpec, *, data_source: str, code_hash: str, provenance: Mapping[str, str] | None = None
) -> Attempt:
    """Write the next attempt's record into the run folder and return it."""
    number = max(_all_attempt_numbers(run_folder), default=0) + 1
    attempt = Attempt(
        run_key=spec.run_key,
        number=number,
        spec=spec,
        data_source=data_source,
        code_hash=code_hash,
        submitted_ms=time.time_ns() // 1_000_000,
        provenance=dict(provenance or {}),
    )
    _store(run_folder).write(attempt_name(number), json_bytes(attempt.model_dump(mode="json")))
    return attempt


def _all_attempt_numbers(run_folder: Path) -> list[int]:
    """Numbers of this training's attempts, and of those that were put aside before it."""
    return [number for folder in (run_folder, *_superseded(run_folder).glob("*")) for number in attempt_numbers(folder)]


def attempt_numbers(run_folder: Path) -> list[int]:
    """Numbers of the attempts at one training, in order."""
    return sorted(int(path.stem) for path in (run_folder / "attempts").glob("*.json"))


def training_id(run_folder: Path) -> str:
    """The run key, and from the second training on which attempt began it: `<run key>.<attempt>`."""
    # A training that was put aside lies in a folder of that name.
    run_key = run_folder.name.partition(".")[0]
    first = min(attempt_numbers(run_folder), default=1)
    return run_key if first == 1 else f"{run_key}.{first}"


def latest_code_hash(run_folder: Path) -> str | None:
    """Hash of the code of the latest attempt, None before the first, or if its record is damaged."""
    numbers = attempt_numbers(run_folder)
    try:
        return read_attempt(run_folder, numbers[-1]).code_hash if numbers else None
    except (OSError, ValueError):
        return None


def supersede(run_folder: Path) -> Path:
    """Put a finished training aside, whole, so that the run can be trained anew; returns where it lies now."""
    aside = _superseded(run_folder) / training_id(run_folder)
    aside.parent.mkdir(parents=True, exist_ok=True)
    return run_folder.rename(aside)


def _superseded(run_folder: Path) -> Path:
    return run_folder.parent.parent / "superseded" / run_folder.name


def attempt_name(number: int) -> str:
    """Where an attempt's record lies in a run."""
    return f"attempts/{number:03d}.json"


def attempt_folder(number: int) -> str:
    """Below what name an attempt's other records lie in a run."""
    return f"attempts/{number:03d}"


class Ending(BaseModel):
    """How an attempt without a result ended, as the flow that followed it saw that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    status: Literal["FAILED", "KILLED"]
    cause: str
    ended_ms: int


def write_ending(records: RunStore | Path, number: int, ending: Ending) -> str:
    """Put on record how an attempt ended, and return the object's name."""
    name = f"{attempt_folder(number)}/{ENDING}"
    _store(records).write(name, json_bytes(ending.model_dump(mode="json")))
    return name


def read_ending(records: RunStore | Path, number: int) -> Ending | None:
    """How an attempt ended, None where nobody saw it end, or it has a result, or the record is damaged."""
    try:
        return Ending.model_validate_json(_store(records).read(f"{attempt_folder(number)}/{ENDING}"))
    except (FileNotFoundError, ValueError):
        return None


def read_attempt(records: RunStore | Path, number: int) -> Attempt:
    """The record of one attempt. Raises FileNotFoundError."""
    return Attempt.model_validate_json(_store(records).read(attempt_name(number)))


def journal_entry(attempt: Attempt, report: Mapping[str, Any]) -> JournalEntry:
    """The journal object of what rank 0 reported: metrics, with `step`, `epoch` and `timestamp_ms` among them."""
    values = dict(report)
    step, epoch, timestamp_ms = (int(values.pop(name)) for name in ("step", "epoch", "timestamp_ms"))
    finite, non_finite = split_finite(values)
    return JournalEntry(
        run_key=attempt.run_key,
        attempt=attempt.number,
        step=step,
        epoch=epoch,
        timestamp_ms=timestamp_ms,
        seconds=finite.get("time/train_s", 0.0) + finite.get("time/validate_s", 0.0),
        code_hash=attempt.code_hash,
        metrics=finite,
        non_finite=non_finite,
    )


def entry_name(entry: JournalEntry) -> str:
    """Where a journal object lies in a run."""
    return f"{JOURNAL}/{entry.attempt:03d}-{entry.step:09d}.json"


def write_entry(records: RunStore | Path, entry: JournalEntry) -> None:
    """Write one journal object, atomically; one that is there stays, as it may be logged already."""
    store, name = _store(records), entry_name(entry)
    if not store.exists(name):
        store.write(name, json_bytes(entry.model_dump(mode="json")))


def complete_journal(records: RunStore | Path, attempt: Attempt, checkpoint: Path) -> None:
    """Write the journal object of a checkpoint's epoch if it is missing.

    It is written a moment after the checkpoint is there: a kill in between would lose the epoch's numbers, for training
    does not pass there again.
    """
    report = json.loads((checkpoint / "state.json").read_bytes()).get("report")
    if report and report["step"] not in {entry.step for entry in read_journal(records)}:
        write_entry(records, journal_entry(attempt, report))


def read_journal(records: RunStore | Path) -> list[JournalEntry]:
    """Every epoch once, by step: where an epoch was redone, its first report counts, as it may be logged already."""
    store = _store(records)
    by_step: dict[int, JournalEntry] = {}
    for name in store.names(JOURNAL):
        try:
            entry = JournalEntry.model_validate_json(store.read(name))
        except ValueError as error:
            warnings.warn(f"{name} is unreadable and left out: {error}", stacklevel=2)
            continue
        by_step.setdefault(entry.step, entry)
    return [by_step[step] for step in sorted(by_step)]


def _store(records: RunStore | Path) -> RunStore:
    return FolderStore(records) if isinstance(records, Path) else records


def split_finite(metrics: dict[str, Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Finite numbers, and the names of the values that are not finite."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return finite, tuple(sorted(numbers.keys() - finite.keys()))


class RunResult(BaseModel):
    """A finished run. It exists only when everything it names exists: written last.

    `files` are sha256 sums by path relative to the run folder; `seconds` is the wall-clock breakdown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_key: str
    spec: RunSpec
    scores: dict[Literal["val", "test"], ScoreResult]
    files: dict[str, str]
    attempts: int
    seconds: dict[str, float]
    code_hash: str
    finished_ms: int


class CorruptResult(ValueError):
    """A result whose files are missing or changed."""


def write_result(records: RunStore | Path, result: RunResult) -> None:
    """Write `result.json`: from here on the run is done."""
    _store(records).write(RESULT, json_bytes(result.model_dump(mode="json")))


def read_result(run_folder: Path) -> RunResult | None:
    """The finished run, or None while there is none.

    Raises:
        CorruptResult: a file that the result names is missing or has other bytes.
    """
    path = run_folder / RESULT
    if not path.is_file():
        return None
    try:
        result = RunResult.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise CorruptResult(f"{path} is unreadable; delete it to score the run again: {error}") from error
    require_files(run_folder, result)
    return result


def require_files(run_folder: Path, result: RunResult) -> None:
    """Raise CorruptResult unless every file that a result names is there, with the bytes that it had."""
    for name, expected in result.files.items():
        file = run_folder / name
        if not file.is_file() or file_sha256(file) != expected:
            raise CorruptResult(
                f"{file} is missing or differs from its sha256 in {RESULT}; "
                f"delete {run_folder / RESULT} to score the run again from its last checkpoint"
            )


def hash_files(run_folder: Path, folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by path relative to `run_folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(run_folder).as_posix(): file_sha256(path) for path in files}

"""What runs leave in storage, without training any."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from evaluation.result import ScoreResult, score_key
from training.ledger import UsageLog
from training.records import (
    Ending,
    JournalEntry,
    RunResult,
    hash_files,
    record_attempt,
    write_ending,
    write_entry,
    write_result,
)
from training.scoring import score_options
from training.spec import RunSpec
from training.store import FolderStore

STEPS_PER_EPOCH = 6


def leave_run(
    folder: Path,
    spec: RunSpec,
    *,
    metrics: tuple[str, ...],
    num_epochs: int = 3,
    ending: str | None = "finished",
    artifacts: dict[str, bytes] | None = None,
) -> Path:
    """A run's folder after an attempt at it, of which MLflow never heard.

    `ending`: `finished`, why it failed, or None for one that is under way. Each metric is 1 / epoch.
    """
    attempt = record_attempt(folder, spec, data_source="", code_hash="c", provenance={"speck.host": "here"})
    usage = UsageLog(FolderStore(folder), attempt, 1, print)
    usage.resumed(0, 0.0)
    usage.close()
    for epoch in range(1, num_epochs + 1):
        write_entry(
            folder,
            JournalEntry(
                run_key=spec.run_key, attempt=attempt.number, step=STEPS_PER_EPOCH * epoch, epoch=epoch, seconds=1,
                timestamp_ms=1_000 + epoch, code_hash="c", metrics=dict.fromkeys(metrics, 1 / epoch),
            ),
        )  # fmt: skip
    if ending == "finished":
        (folder / "artifacts").mkdir()
        for name, content in (artifacts or {"weights.safetensors": b"weights"}).items():
            (folder / "artifacts" / name).write_bytes(content)
        files = hash_files(folder, folder / "artifacts")
        write_result(folder, result_of(spec, 0.25, 0.5, files=files, attempts=attempt.number))
    elif ending is not None:
        write_ending(folder, attempt.number, Ending(status="FAILED", cause=ending, ended_ms=7_000))
    return folder


def history(num_epochs: int = 3) -> list[tuple[int, int, float]]:
    """Step, timestamp and value of every metric of such a run."""
    return [(STEPS_PER_EPOCH * n, 1_000 + n, 1 / n) for n in range(1, num_epochs + 1)]


def result_of(spec: RunSpec, val_ap: float | None, test_ap: float | None, **changes: Any) -> RunResult:
    """The result of a finished run with these AP values."""
    scores = {"val": _score(spec, "val", val_ap), "test": _score(spec, "test", test_ap)}
    values = {
        "files": {},
        "attempts": 1,
        "seconds": {"score_test": 2.0, "job": 60.0},
        "code_hash": "c0de",
        "finished_ms": 1_000,
    }
    return RunResult(run_key=spec.run_key, spec=spec, scores=scores, **(values | changes))


def _score(spec: RunSpec, split: Literal["val", "test"], ap: float | None) -> ScoreResult:
    options, protocol = score_options(spec), spec.dataset.card.protocol
    return ScoreResult(
        run_key=spec.run_key, score_key=score_key(protocol, options), protocol=protocol, dataset_name=spec.dataset.name,
        dataset_version=spec.dataset.version, split=split, options=options,
        metrics={"coco/AP": ap, "coco/AP50": None if ap is None else ap / 2 + 0.5, "coco/AP_small": None},
        per_class={"bright": {"coco/AP": ap, "coco/AR": 0.75}, "dark": {"coco/AP": None}}, counts={"num_images": 8},
    )  # fmt: skip

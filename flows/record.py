"""From a run's folder to its MLflow run. Whatever happens to MLflow, training never notices."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.summary import summarise
from flows.settings import REPO
from tracking.client import connect
from tracking.runs import DatasetRef, JournalEntry, ensure_run, finish, replay, upload
from training.checkpoint import write_json
from training.ledger import Ledger, read_ledger
from training.records import Attempt, RunResult, read_journal, training_id
from training.spec import RunSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEDGER_FILE = "ledger.json"


class Recorder:
    """Keeps one cell's MLflow run up to date with its journal.

    When the store is unreachable it says so once and stops trying until the next `begin`; the journal keeps everything.
    """

    def __init__(self, tracking_uri: str, parent_run_id: str | None, warn: Callable[[str], None]) -> None:
        self._tracking_uri, self._parent_run_id, self._warn = tracking_uri, parent_run_id, warn
        self._client: MlflowClient | None = None
        self._lost = False
        self.run_id: str | None = None

    def begin(self, attempt: Attempt, run_folder: Path) -> None:
        """Create or find the run of this cell's training; it tells of the attempt that trained it."""
        spec = attempt.spec

        def create(client: MlflowClient) -> None:
            self.run_id = ensure_run(
                client,
                experiment=spec.dataset.name,
                run_key=spec.run_key,
                training_id=training_id(run_folder),
                name=f"{spec.architecture.label}-s{spec.seed}-{_short(training_id(run_folder))}",
                params=flat_params(spec),
                tags={**attempt.provenance, "speck.code_hash": attempt.code_hash,
                      "architecture": spec.architecture.label, "dataset": spec.dataset.name,
                      "dataset_version": spec.dataset.version},
                dataset=DatasetRef(
                    spec.dataset.name,
                    spec.dataset.version,
                    spec.dataset.card.source,
                    summarise(spec.dataset.name, REPO).num_images,
                ),
                start_time_ms=attempt.submitted_ms,
                parent_run_id=self._parent_run_id,
            )  # fmt: skip

        self._lost = False
        if self.run_id is None:
            self._try(create)

    def sync(self, run_folder: Path) -> None:
        """Send what the journal has and MLflow has not."""

        def send(client: MlflowClient) -> None:
            if self.run_id is not None:
                entries = [
                    JournalEntry(entry.step, entry.epoch, entry.timestamp_ms, entry.metrics)
                    for entry in read_journal(run_folder)
                ]
                replay(client, self.run_id, entries)

        self._try(send)

    def finish(self, run_folder: Path, result: RunResult) -> None:
        """Send the rest of the journal, the scores and the artifacts, and close the run."""
        self.sync(run_folder)

        def close(client: MlflowClient) -> None:
            if self.run_id is not None:
                finish(
                    client,
                    self.run_id,
                    "FINISHED",
                    scores=flat_scores(result) | _log_ledger(client, self.run_id, run_folder),
                    artifacts_dir=run_folder / "artifacts",
                    end_time_ms=result.finished_ms,
                )

        self._try(close)

    def end(self, run_folder: Path, status: Literal["FAILED", "KILLED"]) -> None:
        """Send what the journal has and close the run without a result; a later attempt opens it again."""
        self.sync(run_folder)

        def close(client: MlflowClient) -> None:
            if self.run_id is not None:
                costs = _log_ledger(client, self.run_id, run_folder)
                finish(client, self.run_id, status, scores=costs, artifacts_dir=None, end_time_ms=_now_ms())

        self._try(close)

    def _try(self, action: Callable[[MlflowClient], None]) -> None:
        if self._lost:
            return
        try:
            if self._client is None:
                self._client = connect(self._tracking_uri)
            action(self._client)
        except Exception as error:
            # Not only TrackingUnavailable: a run that somebody deletes meanwhile must not stop training either.
            self._lost = True
            self._warn(f"MLflow is left behind, training goes on: {type(error).__name__}: {error}")


def _log_ledger(client: MlflowClient, run_id: str, run_folder: Path) -> dict[str, float]:
    """Keep what each attempt held as the run's artifact LEDGER_FILE; returns the metrics."""
    ledger = read_ledger(run_folder)
    if ledger is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="speck-ledger-") as folder:
        write_json(Path(folder) / LEDGER_FILE, ledger.as_json())
        upload(client, run_id, Path(folder))
    return flat_ledger(ledger)


def _short(training: str) -> str:
    run_key, dot, attempt = training.partition(".")
    return f"{run_key[:6]}{dot}{attempt}"


def flat_params(spec: RunSpec) -> dict[str, str]:
    """The spec as dotted names and short values, without the dataset's card.

    The axes of the matrix are called `architecture`, `dataset`, `dataset_version` and `seed`, and come before all other
    names that differ between cells: MLflow's comparison shows the first parameters that differ.
    """
    content = spec.model_dump(mode="json")
    architecture, dataset = content.pop("architecture"), content.pop("dataset")
    axes = {"architecture": architecture["name"], "dataset": dataset["name"], "dataset_version": dataset["version"]}
    return {name: str(value) for name, value in _flatten(axes | content | {"settings": architecture["settings"]}, "")}


def _flatten(content: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in content.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return flat


def flat_ledger(ledger: Ledger) -> dict[str, float]:
    """What all attempts held and what came of it, as metrics `ledger/...`; hours are of GPUs or of CPUs."""
    total = ledger.total
    unit = f"{ledger.accelerator.lower()}_h"
    metrics = {
        f"ledger/held_{unit}": total.held_s / 3600,
        f"ledger/wasted_{unit}": total.wasted_s / 3600,
        "ledger/useful_share": total.useful_share,
        "ledger/starts": float(total.num_starts),
    }
    return metrics if total.price is None else metrics | {"ledger/price": total.price}


def flat_scores(result: RunResult) -> dict[str, float]:
    """Scores as `final/split/protocol/metric[/class]`, without those that had no ground truth."""
    flat: dict[str, float] = {}
    for split, score in result.scores.items():
        flat |= {f"{split}/{name}": value for name, value in score.metrics.items() if value is not None}
        for label, metrics in score.per_class.items():
            flat |= {f"{split}/{name}/{label}": value for name, value in metrics.items() if value is not None}
    return {f"final/{name}": value for name, value in flat.items()}


def provenance() -> dict[str, str]:
    """Commit, whether the tree differed from it, who and where."""
    commit = _git("rev-parse", "HEAD")
    return {
        "mlflow.source.git.commit": commit or "unknown",
        "speck.dirty": str(bool(_git("status", "--porcelain"))) if commit else "unknown",
        "mlflow.user": _user(),
        "mlflow.source.name": "speck train-all",
        "speck.host": platform.node(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    # A container's user id often has no name.
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

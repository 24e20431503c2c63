"""From a run's folder to its MLflow run. Whatever happens to MLflow, training never notices."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.summary import summarise
from flows.attempts import as_tags, attempts_of
from flows.settings import REPO
from tracking.client import TrackingUnavailable, connect, run_page
from tracking.runs import (
    DatasetRef,
    JournalEntry,
    Replayed,
    Sent,
    annotate,
    ensure_run,
    finish,
    replay,
    upload,
)
from training.checkpoint import write_json
from training.ledger import Ledger, read_ledger
from training.records import RESULT, Attempt, Ending, RunResult, attempt_folder, read_journal, training_id
from training.records import JournalEntry as Report
from training.spec import RunSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEDGER_FILE, ATTEMPTS_FILE = "ledger.json", "attempts.json"
# A store that went away is asked again after this while training goes on: a dead one costs up to a minute.
RETRY_EVERY_S = 120.0


class Recorder:
    """Keeps one cell's MLflow run up to date with its journal.

    When the store is unreachable it says so once and leaves it alone for RETRY_EVERY_S; the journal keeps everything.
    """

    def __init__(self, tracking_uri: str, parent_run_id: str | None, warn: Callable[[str], None]) -> None:
        self._tracking_uri, self._parent_run_id, self._warn = tracking_uri, parent_run_id, warn
        self._client: MlflowClient | None = None
        self._open: Callable[[MlflowClient], str] | None = None
        self._is_open = self._is_told = False
        self._next_try = 0.0
        self._sent: set[int] = set()
        self.run_id: str | None = None

    @property
    def page(self) -> str | None:
        """Address of the run's page; None as long as there is no run, or where the store is no server."""
        return None if self.run_id is None else run_page(self._tracking_uri, self.run_id)

    def begin(self, attempt: Attempt, run_folder: Path) -> None:
        """Create or find the run of this cell's training; it tells of the attempt that trained it."""
        self._open = lambda client: open_run(client, attempt, run_folder, self._parent_run_id)

        def describe(client: MlflowClient, run_id: str) -> None:
            # A finished run is described when it is closed.
            if not (run_folder / RESULT).is_file():
                send_records(client, run_id, run_folder, None)

        self._try(describe, at_once=True)

    def sync(self, run_folder: Path) -> None:
        """Send what the journal has and MLflow has not."""
        if self._open is not None:
            self._try(lambda client, run_id: self._replay(client, run_id, run_folder))

    def finish(self, run_folder: Path, result: RunResult) -> None:
        """Send the rest of the journal, the scores and the artifacts, and close the run."""
        self._close(run_folder, result)

    def end(self, run_folder: Path, ending: Ending) -> None:
        """Send what the journal has and close the run without a result; a later attempt opens it again."""
        self._close(run_folder, ending)

    def _close(self, run_folder: Path, outcome: RunResult | Ending) -> None:
        def close(client: MlflowClient, run_id: str) -> None:
            self._replay(client, run_id, run_folder)
            close_run(client, run_id, run_folder, outcome)

        self._try(close, at_once=True)

    def _replay(self, client: MlflowClient, run_id: str, run_folder: Path) -> None:
        new = [entry for entry in read_journal(run_folder) if entry.step not in self._sent]
        if new:
            send_journal(client, run_id, new)
            self._sent |= {entry.step for entry in new}

    def _try(self, action: Callable[[MlflowClient, str], object], *, at_once: bool = False) -> None:
        if self._open is None or (not at_once and time.monotonic() < self._next_try):
            return
        try:
            self._on_run(action)
            self._is_told, self._next_try = False, 0.0
        except Exception as error:
            # Not only TrackingUnavailable: a run that somebody deletes meanwhile must not stop training either.
            self._is_open, self._next_try = False, time.monotonic() + RETRY_EVERY_S
            if not self._is_told:
                self._warn(f"MLflow is left behind, training goes on: {type(error).__name__}: {error}")
            self._is_told = True

    def _on_run(self, action: Callable[[MlflowClient, str], object]) -> None:
        if self._client is None:
            self._client = connect(self._tracking_uri)
        if self._is_open and self.run_id is not None:
            try:
                action(self._client, self.run_id)
                return
            except TrackingUnavailable:
                raise
            except Exception:
                # Most likely the run was deleted: another process had made one for the same training.
                self._is_open = False
        assert self._open is not None
        self.run_id, self._is_open = self._open(self._client), True
        self._sent.clear()
        action(self._client, self.run_id)


def open_run(client: MlflowClient, attempt: Attempt, run_folder: Path, parent_run_id: str | None = None) -> str:
    """The id of the MLflow run of the training in a folder, made if need be as that of this attempt."""
    spec, training = attempt.spec, training_id(run_folder)
    current = summarise(spec.dataset.name, REPO)
    return ensure_run(
        client,
        experiment=spec.dataset.name,
        run_key=spec.run_key,
        training_id=training,
        name=f"{spec.architecture.label}-s{spec.seed}-{_short(training)}",
        params=flat_params(spec),
        tags={**attempt.provenance, "speck.code_hash": attempt.code_hash,
              "architecture": spec.architecture.label, "dataset": spec.dataset.name,
              "dataset_version": spec.dataset.version},
        dataset=DatasetRef(
            spec.dataset.name,
            spec.dataset.version,
            spec.dataset.card.source,
            current.num_images if current.version == spec.dataset.version else {},
        ),
        start_time_ms=attempt.submitted_ms,
        parent_run_id=parent_run_id,
    )  # fmt: skip


def send_journal(client: MlflowClient, run_id: str, journal: Sequence[Report]) -> Replayed:
    """Send what MLflow lacks of these epochs."""
    entries = [JournalEntry(entry.step, entry.epoch, entry.timestamp_ms, entry.metrics) for entry in journal]
    return replay(client, run_id, entries)


def send_records(client: MlflowClient, run_id: str, run_folder: Path, result: RunResult | None) -> int:
    """Keep what is known of every attempt as tags and artifacts of the run; returns how many files had to be sent."""
    attempts, ledger = attempts_of(run_folder, result), read_ledger(run_folder)
    if not attempts:
        return 0
    annotate(client, run_id, as_tags(attempts))
    with tempfile.TemporaryDirectory(prefix="speck-records-") as name:
        folder = Path(name)
        write_json(folder / ATTEMPTS_FILE, attempts)
        if ledger is not None:
            write_json(folder / LEDGER_FILE, ledger.as_json())
        for attempt in attempts:
            below = attempt_folder(attempt["number"])
            if (run_folder / below).is_dir():
                shutil.copytree(run_folder / below, folder / below)
        return upload(client, run_id, folder)


def close_run(client: MlflowClient, run_id: str, run_folder: Path, outcome: RunResult | Ending) -> Sent:
    """Send the scores and artifacts, if there is a result, and all that is known of the attempts; close the run."""
    result = outcome if isinstance(outcome, RunResult) else None
    num_records = send_records(client, run_id, run_folder, result)
    ledger = read_ledger(run_folder)
    sent = finish(
        client,
        run_id,
        outcome.status if isinstance(outcome, Ending) else "FINISHED",
        scores=({} if result is None else flat_scores(result)) | ({} if ledger is None else flat_ledger(ledger)),
        artifacts_dir=None if result is None else run_folder / "artifacts",
        end_time_ms=outcome.ended_ms if isinstance(outcome, Ending) else outcome.finished_ms,
    )
    return sent._replace(num_files=sent.num_files + num_records)


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
    return {name: str(value) for name, value in flat(axes | content | {"settings": architecture["settings"]}, "")}


def flat(content: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Nested content as dotted names that begin with `prefix`, and values."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


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

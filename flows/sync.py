"""Bringing MLflow up to date with all trainings in storage, whatever became of the flows that followed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.evaluate import UnknownRun
from flows.mirror import SUPERSEDED
from flows.record import close_run, open_run, send_journal, send_records
from flows.settings import Settings
from tracking.client import TrackingUnavailable
from tracking.runs import find_run
from training.records import (
    Attempt,
    CorruptResult,
    RunResult,
    attempt_numbers,
    read_attempt,
    read_ending,
    read_journal,
    read_result,
    training_id,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Other processes may make, or delete, a run of the same training meanwhile: by then one of them has won.
NUM_TRIES = 4


@dataclass(frozen=True)
class Synced:
    """One training and what MLflow lacked of it; `problem` says why it was left as it was, or could not be sent."""

    training: str
    title: str
    run_id: str | None = None
    is_new: bool = False
    num_metrics: int = 0
    num_files: int = 0
    problem: str | None = None
    is_failed: bool = False

    @property
    def outcome(self) -> str:
        """In words."""
        if self.problem is not None:
            return self.problem
        if not (self.is_new or self.num_metrics or self.num_files):
            return "nothing was lacking"
        return f"{'made, ' if self.is_new else ''}{self.num_metrics} metric values and {self.num_files} files sent"


def trainings(settings: Settings, run_keys: Sequence[str] = ()) -> list[Path]:
    """The folders of all trainings in storage, or of runs whose keys begin so; those that were put aside come first.

    Raises:
        UnknownRun: no run's key begins so, or several do.
    """
    aside = settings.storage.parent / SUPERSEDED
    attempts = [*aside.glob("*/*/attempts/*.json"), *settings.storage.glob("*/attempts/*.json")]
    folders = sorted({path.parents[1] for path in attempts}, key=lambda folder: (_run_key(folder), folder.parts[-2:]))
    known = dict.fromkeys(_run_key(folder) for folder in folders)
    wanted = set()
    for asked in run_keys:
        matching = [key for key in known if key.startswith(asked)]
        if len(matching) != 1:
            found = "several do" if matching else "none does"
            raise UnknownRun(f"{asked!r} must begin the key of exactly one run; {found}. Runs: {', '.join(known)}")
        wanted.add(matching[0])
    # Later trainings tell earlier ones in MLflow that they are superseded, so these have to be there.
    chosen = [folder for folder in folders if not run_keys or _run_key(folder) in wanted]
    return sorted(chosen, key=lambda folder: (_run_key(folder), attempt_numbers(folder)))


def sync(client: MlflowClient, folders: Sequence[Path], *, restores: bool) -> Iterator[Synced]:
    """Send what MLflow lacks of each training. `restores`: also of runs that somebody deleted there.

    Raises:
        TrackingUnavailable: the store does not answer; what was sent stays.
    """
    for folder in folders:
        training = training_id(folder)
        try:
            yield _sync_training(client, folder, restores=restores)
        except TrackingUnavailable:
            raise
        except Exception as error:
            yield Synced(training, "", problem=f"not sent: {type(error).__name__}: {error}", is_failed=True)


def _sync_training(client: MlflowClient, folder: Path, *, restores: bool) -> Synced:
    result = _result(folder)
    attempt = read_attempt(folder, attempt_numbers(folder)[-1] if result is None else result.attempts)
    training, title = training_id(folder), attempt.spec.title
    there = find_run(client, attempt.spec.dataset.name, training)
    if there is not None and there.is_deleted and not restores:
        problem = f"deleted in MLflow, and left so; `speck sync {attempt.run_key}` brings it back"
        return Synced(training, title, there.run_id, problem=problem)

    def send() -> Synced:
        run_id = open_run(client, attempt, folder)
        num_metrics, num_files = _send(client, run_id, folder, attempt, result)
        return Synced(training, title, run_id, there is None, num_metrics, num_files)

    return _again(send)


def _send(
    client: MlflowClient, run_id: str, folder: Path, attempt: Attempt, result: RunResult | None
) -> tuple[int, int]:
    """Counts of metric values and files that were sent."""
    num_replayed = send_journal(client, run_id, read_journal(folder)).num_sent
    outcome = result or read_ending(folder, attempt.number)
    if outcome is None:
        return num_replayed, send_records(client, run_id, folder, None)
    sent = close_run(client, run_id, folder, outcome)
    return num_replayed + sent.num_metrics, sent.num_files


def _again(send: Callable[[], Synced]) -> Synced:
    for tries_left in reversed(range(NUM_TRIES)):
        try:
            return send()
        except TrackingUnavailable:
            raise
        except Exception:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


def _result(folder: Path) -> RunResult | None:
    try:
        return read_result(folder)
    except CorruptResult:
        # The next flow trains it to its end again.
        return None


def _run_key(folder: Path) -> str:
    return folder.name.partition(".")[0]

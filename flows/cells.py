"""One cell of the matrix: doing on the cluster what there is to do for it, and recording it in MLflow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from flows.cell_page import CellPage
from flows.evaluate import score_again
from flows.lease import Lease, LeaseLost, lease
from flows.mirror import Mirror
from flows.plan import OnCodeChange, PlannedCell, folder_bytes, plan_cell
from flows.provenance import provenance, record_sources
from flows.record import Recorder
from flows.settings import REPO, Settings
from tracking.client import redacted
from training.jobs import CellFailed, Jobs, code_snapshot
from training.records import (
    RESULT,
    Ending,
    JournalEntry,
    RunResult,
    attempt_name,
    read_attempt,
    read_journal,
    read_result,
    record_attempt,
    write_ending,
)
from training.say import PROGRESS_MARK
from training.store import StorageUnavailable

RECORD_EVERY_S = 5.0
# Characters of why an attempt ended.
MAX_CAUSE = 500


class Cancelled(RuntimeError):
    """The flow was asked to stop; what the cell had reached stays for the next run."""


@dataclass(frozen=True)
class CellOutcome:
    """A finished cell. `seconds` tells training, scoring and the rest apart; empty when nothing was trained."""

    result: RunResult
    run_id: str | None
    reused: bool
    seconds: dict[str, float]
    disk_bytes: int = 0


@dataclass(frozen=True)
class CellRunner:
    """What a cell needs from the flow around it. `stop` asks every cell to end early.

    `say` tells people what they want to know, `log` what a job printed beside that. `check_turn` raises LeaseLost once
    another flow run has gone ahead in this one's place. Then no training begins here; those under way have leases of
    their own, and the other one may be following the same jobs.
    """

    jobs: Callable[[], Jobs]
    settings: Settings
    recorder: Recorder
    say: Callable[[str], None]
    stop: threading.Event
    on_code_change: OnCodeChange = "warn"
    log: Callable[[str], None] = lambda _: None
    check_turn: Callable[[], None] = lambda: None

    def run(self, cell: PlannedCell) -> CellOutcome:
        """Bring a cell to its result, and its MLflow run up to date with it.

        Another flow that is at work on the same cell is waited for.

        Raises:
            CellFailed: the job ended without a result. What it had reached stays for the next attempt.
            Cancelled: `stop` was set; the cell's job is stopped.
            LeaseLost: another flow took the cell over, or this flow's turn.
            StorageUnavailable: the storage on S3 does not answer before the job, or after it.
        """
        spec, storage = cell.spec, self.settings.storage
        run_folder = storage / spec.run_key
        with lease(storage, spec.run_key, self.say, self._check_stop) as held:
            # What was planned may be done meanwhile.
            cell = plan_cell(spec, self.settings, self.on_code_change)
            wall_s = self._train(cell, held) if cell.trains else None
            if wall_s is not None:
                # The job may have been another flow's, submitted under other rules of scoring.
                cell = plan_cell(spec, self.settings)
            result = read_result(run_folder)
            if result is None:
                raise CellFailed(f"{run_folder / RESULT} is missing although the Ray job succeeded; run again")
            if cell.state == "score":
                self.say(f"scoring again: {cell.why}")
                result = score_again(result, spec, self.settings)
                Mirror(self.settings, spec.run_key).push("artifacts", RESULT)
            self.recorder.begin(read_attempt(run_folder, result.attempts), run_folder)
            self.recorder.finish(run_folder, result)
        seconds = {} if wall_s is None else _breakdown(read_journal(run_folder), result, wall_s)
        reused = wall_s is None
        return CellOutcome(result, self.recorder.run_id, reused, seconds, folder_bytes(run_folder))

    def _train(self, cell: PlannedCell, held: Lease) -> float:
        """Follow the cell's Ray job to its end, a living one or a new one, and return how long that took."""
        self._check_stop()
        spec, jobs, started = cell.spec, self.jobs(), time.monotonic()
        mirror = Mirror(self.settings, spec.run_key)
        run_folder = mirror.folder
        submission_id = jobs.living(spec.run_key)
        if cell.superseding:
            if submission_id is not None:
                self.say(f"stopping Ray job {submission_id}, which trains by other code")
                jobs.stop(submission_id)
                submission_id = None
            self.say(f"the training by other code is kept in {mirror.put_aside()}")
        run_folder.mkdir(parents=True, exist_ok=True)
        if submission_id is None:
            jobs.require_room(spec)
            self._check_ours(held)
            # A damaged result, or none: from here on the run counts as unfinished.
            mirror.delete(RESULT)
            mirror.pull_numbers()
            attempt = record_attempt(
                run_folder,
                spec,
                data_source=self.settings.data_source,
                code_hash=cell.code_hash,
                provenance=provenance(),
            )
            if spec.training.warm_start is not None:
                mirror.push_warm_start(spec.training.warm_start)
            mirror.push(attempt_name(attempt.number), *record_sources(run_folder, attempt))
            with code_snapshot(REPO) as code:
                self._check_ours(held)
                submission_id = jobs.submit(attempt, mirror.url, code)
        else:
            attempt = read_attempt(run_folder, int(submission_id.rpartition("-")[2]))
            self.say(f"attaching to Ray job {submission_id}")
        self.recorder.begin(attempt, run_folder)
        try:
            self._follow(jobs, submission_id, mirror, cell, held)
        except LeaseLost:
            # The run is another flow's now, and so is its record. That flow attaches to the job where it can reach it.
            if jobs.embedded:
                jobs.stop(submission_id)
            raise
        except Exception as error:
            self._put_down(error, mirror, attempt.number)
            if isinstance(error, CellFailed):
                error.job_s = time.monotonic() - started
            raise
        return time.monotonic() - started

    def _put_down(self, error: Exception, mirror: Mirror, number: int) -> None:
        """Put on record how an attempt ended, here, in storage and in MLflow; what fails of that hides no error."""
        ending = Ending(
            status="KILLED" if isinstance(error, Cancelled) else "FAILED",
            cause=redacted(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")[:MAX_CAUSE],
            ended_ms=time.time_ns() // 1_000_000,
        )
        try:
            mirror.push(write_ending(mirror.folder, number, ending))
        except OSError as lost:
            self.say(f"how attempt {number} ended is not on record: {lost}")
        self.recorder.end(mirror.folder, ending)

    def _follow(self, jobs: Jobs, submission_id: str, mirror: Mirror, cell: PlannedCell, held: Lease) -> None:
        run_folder = mirror.folder
        told = {entry.step for entry in read_journal(run_folder)}
        recorded = time.monotonic()
        page = CellPage(cell.spec.run_key, cell.spec.title)
        page.link("Ray", jobs.page(submission_id))

        def record() -> None:
            nonlocal recorded
            try:
                mirror.pull()
            except StorageUnavailable as error:
                # The job may well go on without us.
                self.say(f"no news of the run: {error}")
            self.recorder.sync(run_folder)
            page.link("MLflow", self.recorder.page)
            for entry in read_journal(run_folder):
                if entry.step not in told:
                    told.add(entry.step)
                    self.say(_epoch_line(entry, cell.spec.training.epochs))
            recorded = time.monotonic()

        def on_line(line: str) -> None:
            _, marked, text = line.partition(PROGRESS_MARK)
            if marked:
                self.say(text.strip())
                page.tell(text.strip())
            elif line.strip():
                self.log(line)
            if time.monotonic() - recorded > RECORD_EVERY_S:
                record()

        def ended() -> bool:
            held.check()
            return self.stop.is_set() or (run_folder / RESULT).is_file()

        try:
            jobs.follow(submission_id, on_line, ended)
        finally:
            record()
        if (run_folder / RESULT).is_file():
            page.done()
        if self.stop.is_set() and not (run_folder / RESULT).is_file():
            try:
                jobs.stop(submission_id)
            except (OSError, RuntimeError) as error:
                # An embedded cluster is often gone first: then the job is, too.
                self.say(f"the cluster does not answer, so job {submission_id} was not stopped: {error}")
            self._check_stop()

    def _check_ours(self, held: Lease) -> None:
        held.check()
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Cancelled("the flow was stopped; run it again to go on from the last checkpoint")
        self.check_turn()


def _epoch_line(entry: JournalEntry, epochs: int) -> str:
    numbers = entry.metrics
    parts = [f"loss {numbers['train/loss']:.3f}"] if "train/loss" in numbers else []
    parts += [
        f"val {name} {numbers[f'val/coco/{name}']:.3f}" for name in ("AP", "AP50") if f"val/coco/{name}" in numbers
    ]
    parts += [f"{numbers['train/images_per_s']:.1f} img/s"] if "train/images_per_s" in numbers else []
    return f"epoch {entry.epoch}/{epochs} done: {', '.join(parts)}"


def _breakdown(journal: list[JournalEntry], result: RunResult, wall_s: float) -> dict[str, float]:
    entries = [entry for entry in journal if entry.attempt == result.attempts]
    training = sum(entry.metrics.get("time/train_s", 0.0) for entry in entries)
    scoring = sum(entry.metrics.get("time/validate_s", 0.0) for entry in entries) + result.seconds["score_test"]
    return {"wall": wall_s, "training": training, "scoring": scoring, "overhead": wall_s - training - scoring}

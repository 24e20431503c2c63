"""Cells on a real Ray cluster, followed while they run, with faults in the code of their workers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chaos.processes import wait_until

from training.jobs import CellFailed, Jobs, code_snapshot
from training.records import JournalEntry, RunResult, read_journal, read_result

ROOT = Path(__file__).parents[2]
# On a machine that is busy elsewhere a start takes minutes.
WAIT_S = 300.0
# Joined to the workers' own code.
SHIM = """

_train_worker = train_worker


def train_worker(config):
    from pathlib import Path
    import os, threading
{body}
    _train_worker(config)
"""
# Whoever trains waits after `steps` steps as long as the file `hold` is there, or until it is asked to leave.
HELD = """
import time, training.loop, training.requests
hold, real, count = Path({hold!r}), training.loop.to_device, [0]
def held(*arguments):
    count[0] += 1
    while count[0] > {steps} and hold.exists() and not training.requests.is_leaving():
        time.sleep(0.05)
    return real(*arguments)
training.loop.to_device = held
"""


@contextmanager
def faulty_code(fault: str = "") -> Iterator[Path]:
    """A copy of our code for workers, in which `fault` runs before the training."""
    with code_snapshot(ROOT) as code:
        worker = code / "training" / "worker.py"
        if fault:
            body = "\n".join(f"    {line}" for line in fault.splitlines())
            worker.write_text(worker.read_text() + SHIM.format(body=body))
        yield code


@dataclass
class Cell:
    """One submitted attempt, followed by a thread: `lines` grows while it runs."""

    jobs: Jobs
    submission_id: str
    folder: Path
    lines: list[str] = field(default_factory=list)
    failed: CellFailed | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            self.jobs.follow(self.submission_id, self.lines.append)
        except CellFailed as error:
            self.failed = error

    def join(self) -> str:
        """Wait for its end; returns what it said."""
        self._thread.join(2 * WAIT_S)
        assert not self._thread.is_alive(), self.output
        return self.output

    def result(self) -> RunResult:
        """What it left, after it has ended well."""
        self.join()
        result = read_result(self.folder)
        assert self.failed is None, self.failed
        assert result is not None, self.output
        return result

    def journal(self) -> list[JournalEntry]:
        """What the run has reported so far."""
        return read_journal(self.folder)

    def wait_for_epoch(self, epoch: int) -> None:
        """Return when the epoch was reported, or a later one."""
        self._wait(lambda: any(entry.epoch >= epoch for entry in self.journal()), f"epoch {epoch}")

    def wait_for_line(self, pattern: str) -> None:
        """Return when it has said this."""
        self._wait(lambda: self.told(pattern), pattern)

    def told(self, pattern: str) -> list[str]:
        """What matched the pattern in the lines for people, in order."""
        return [found[0] for line in list(self.lines) if "[speck]" in line and (found := re.search(pattern, line))]

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        def is_so() -> object:
            assert self._thread.is_alive(), f"ended before {what}: {self.failed}\n{self.output}"
            return condition()

        try:
            wait_until(is_so, WAIT_S, what)
        except TimeoutError:
            raise AssertionError(f"never {what}:\n{self.output}") from None

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

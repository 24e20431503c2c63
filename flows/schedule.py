"""Which cell runs when: as many at once as the cluster has room for, short ones first, and all stop together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from flows.budget import BudgetSpent
from flows.cells import Cancelled, CellOutcome
from flows.plan import PlannedCell
from training.jobs import demand

# Room may come from other people's jobs that end.
LOOK_EVERY_S = 2.0
# Of a flow that is told to stop: its jobs get this long to end.
STOP_PATIENCE_S = 25.0


class Future(Protocol):
    """A cell under way, as `Task.submit` returns it."""

    def add_done_callback(self, fn: Callable[..., None], /) -> None:
        """Call `fn` once the cell has ended."""
        ...

    def result(self) -> CellOutcome:
        """Its outcome; raises what it raised."""
        ...


def run_cells(
    cells: Sequence[PlannedCell],
    start: Callable[[PlannedCell], Future],
    room: Callable[[Sequence[str]], Mapping[str, float]],
    stop: threading.Event,
    spent: Callable[[], str | None] = lambda: None,
) -> list[tuple[PlannedCell, CellOutcome | Exception]]:
    """Run every cell; the outcomes in the order of `cells`.

    `room(own)`: CPUs and GPUs that jobs other than those of the run keys `own` leave free. A cell is never passed by
    a longer one's successors: the next waits until it fits, alone if it must. When this thread is interrupted, `stop`
    is set and the cells under way are waited for. So it is when `spent` says why the budget is; then cells that would
    train are not started any more, and those that were stopped have BudgetSpent for an outcome, too.
    """
    # Scoring happens here, one cell at a time; the cluster should not wait for it.
    waiting = sorted(
        cells,
        key=lambda cell: (
            cell.state == "score", cell.trains, cell.estimate.seconds if cell.estimate else float("inf"),
        ),
    )  # fmt: skip
    running: dict[str, tuple[PlannedCell, Future]] = {}
    outcomes: dict[str, CellOutcome | Exception] = {}
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    try:
        while waiting or running:
            if (why := spent()) is not None and (running or any(cell.trains for cell in waiting)):
                stop.set()
                outcomes |= {cell.spec.run_key: BudgetSpent(f"not started: {why}") for cell in waiting if cell.trains}
                waiting = [cell for cell in waiting if not cell.trains]
            while waiting and _fits(waiting[0], [cell for cell, _ in running.values()], room):
                cell = waiting.pop(0)
                key = cell.spec.run_key
                running[key] = cell, start(cell)
                running[key][1].add_done_callback(lambda _, key=key: done.put(key))
            try:
                key = done.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                continue
            outcome = _outcome(running.pop(key)[1])
            if isinstance(outcome, Cancelled) and (why := spent()) is not None:
                outcome = BudgetSpent(f"stopped at a checkpoint: {why}")
            outcomes[key] = outcome
    except BaseException:
        stop.set()
        _wait(set(running), done)
        raise
    return [(cell, outcomes[cell.spec.run_key]) for cell in cells]


def _fits(
    cell: PlannedCell, running: Sequence[PlannedCell], room: Callable[[Sequence[str]], Mapping[str, float]]
) -> bool:
    if not running:
        return True
    if not cell.trains:
        # Reading and recording: one at a time.
        return False
    free = dict(room([other.spec.run_key for other in running]))
    for other in running:
        for kind, amount in demand(other.spec).items():
            free[kind] -= amount
    return all(amount <= free[kind] for kind, amount in demand(cell.spec).items())


def _outcome(future: Future) -> CellOutcome | Exception:
    # A poisoned cell fails alone.
    try:
        return future.result()
    except Exception as error:
        return error


def _wait(running: set[str], done: queue.SimpleQueue[str]) -> None:
    while running:
        try:
            running.discard(done.get(timeout=STOP_PATIENCE_S))
        except queue.Empty:
            return

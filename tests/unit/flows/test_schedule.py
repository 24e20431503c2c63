"""The order and the number of cells in flight, with cells that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from flows.cells import Cancelled, CellOutcome
from flows.plan import Estimate, PlannedCell, State
from flows.schedule import run_cells
from training.records import RunResult
from training.spec import ComputeSpec, RunSpec


@pytest.fixture
def plan(cell_spec: Callable[..., RunSpec]) -> Callable[..., PlannedCell]:
    def make(seed: int, seconds: float | None, state: State = "train", workers: int = 1) -> PlannedCell:
        spec = cell_spec(seed=seed).model_copy(update={"compute": ComputeSpec(workers=workers)})
        estimate = None if seconds is None else Estimate(seconds, 1, "probe")
        return PlannedCell(spec, state, "", "", estimate=estimate)

    return make


class Cluster:
    """Remembers the order of starts and the most cells at once; `cpus` are free beside them."""

    def __init__(self, make_result: Callable[..., RunResult], cpus: float) -> None:
        self.make_result, self.cpus = make_result, cpus
        self.started: list[int] = []
        self.running = self.most = 0
        self.asked: list[list[str]] = []
        self.failing: set[int] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(8)
        self.pause = threading.Event()

    def start(self, cell: PlannedCell) -> Future[CellOutcome]:
        with self._lock:
            self.started.append(cell.spec.seed)
            self.running += 1
            self.most = max(self.most, self.running)
        return self._pool.submit(self._work, cell)

    def _work(self, cell: PlannedCell) -> CellOutcome:
        self.pause.wait(0.05)
        with self._lock:
            self.running -= 1
        if cell.spec.seed in self.failing:
            raise RuntimeError(f"poisoned {cell.spec.seed}")
        return CellOutcome(self.make_result(cell.spec, 0.5, 0.5), None, False, {})

    def room(self, own: Sequence[str]) -> Mapping[str, float]:
        self.asked.append(list(own))
        return {"CPU": self.cpus, "GPU": 0.0}


@pytest.fixture
def cluster(make_result: Callable[..., RunResult]) -> Callable[[float], Cluster]:
    return lambda cpus: Cluster(make_result, cpus)


def test_finished_cells_first_then_short_ones_then_unknown_ones(
    plan: Callable[..., PlannedCell], cluster: Callable[[float], Cluster]
) -> None:
    cells = [plan(0, None), plan(1, 30.0), plan(2, 10.0), plan(3, None, "cached")]
    one = cluster(1)
    outcomes = run_cells(cells, one.start, one.room, threading.Event())
    assert one.started == [3, 2, 1, 0]
    assert one.most == 1
    assert [cell for cell, _ in outcomes] == cells


@pytest.mark.parametrize(("cpus", "most"), [(0, 1), (2, 1), (4, 2), (7, 3), (100, 6)])
def test_as_many_cells_at_once_as_there_is_room_for(
    plan: Callable[..., PlannedCell], cluster: Callable[[float], Cluster], cpus: int, most: int
) -> None:
    many = cluster(cpus)
    outcomes = run_cells([plan(seed, 1.0, workers=2) for seed in range(6)], many.start, many.room, threading.Event())
    assert (many.most, len(outcomes)) == (most, 6)
    assert all(len(set(own)) == len(own) > 0 for own in many.asked)


def test_a_wide_cell_is_not_passed_by_narrow_ones_behind_it(
    plan: Callable[..., PlannedCell], cluster: Callable[[float], Cluster]
) -> None:
    small = cluster(2)
    run_cells(
        [plan(0, 1.0), plan(1, 2.0, workers=2), plan(2, 3.0), plan(3, 4.0)], small.start, small.room, threading.Event()
    )
    assert small.started == [0, 1, 2, 3]


def test_a_poisoned_cell_fails_alone(plan: Callable[..., PlannedCell], cluster: Callable[[float], Cluster]) -> None:
    two = cluster(2)
    two.failing = {1}
    outcomes = run_cells([plan(seed, 1.0) for seed in range(4)], two.start, two.room, threading.Event())
    assert [str(outcome) for _, outcome in outcomes if isinstance(outcome, Exception)] == ["poisoned 1"]
    assert sum(isinstance(outcome, CellOutcome) for _, outcome in outcomes) == 3


def test_an_interrupt_stops_all_and_waits_for_what_is_under_way(plan: Callable[..., PlannedCell]) -> None:
    stop, ended = threading.Event(), []

    def work(cell: PlannedCell) -> CellOutcome:
        assert stop.wait(300)
        ended.append(cell.spec.seed)
        raise Cancelled

    def room(own: Sequence[str]) -> Mapping[str, float]:
        if len(own) == 2:
            raise KeyboardInterrupt
        return {"CPU": 9.0, "GPU": 0.0}

    with ThreadPoolExecutor(4) as pool, pytest.raises(KeyboardInterrupt):
        run_cells([plan(seed, 1.0) for seed in range(4)], lambda cell: pool.submit(work, cell), room, stop)
    assert sorted(ended) == [0, 1]

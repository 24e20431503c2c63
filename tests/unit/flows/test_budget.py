"""Budgets, from ledgers that are worked out by hand, and what a matrix does when one is spent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.budget import LOOK_EVERY_S, Budget, BudgetSpent, Purse
from flows.cells import Cancelled, CellOutcome
from flows.experiment import BadExperiment, load_experiment
from flows.leaderboard import make_rows, spent
from flows.plan import PlannedCell
from flows.report import Report, Unfinished
from flows.schedule import run_cells
from training.checkpoint import write_json
from training.ledger import Usage
from training.records import RunResult
from training.spec import RunSpec


def held(
    storage: Path, run_key: str, seconds: float, *, workers: int = 2, price: float | None = 3.0, number: int = 0
) -> None:
    """A start of two workers of half a GPU each, at 3.00 a GPU-hour."""
    usage = Usage(
        attempt=1, started_ms=0, last_ms=int(seconds * 1000), workers=workers, cpus_per_worker=4, gpus_per_worker=0.5,
        price_per_hour=price,
    )  # fmt: skip
    (storage / run_key / "ledger").mkdir(parents=True, exist_ok=True)
    write_json(storage / run_key / "ledger" / f"001-{number}.json", usage.model_dump(mode="json"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_hours_and_prices_of_all_cells_count_from_the_start_of_the_run(tmp_path: Path) -> None:
    held(tmp_path, "a", 3600)
    clock = Clock()
    by_hours = Purse(Budget(accelerator_hours=1.5), tmp_path, ["a", "b"], clock)
    by_price = Purse(Budget(price=6.5), tmp_path, ["a", "b"], clock)
    # One GPU-hour more of a, half a one of b: 1.5 in this run, and 4.50.
    held(tmp_path, "a", 7200)
    held(tmp_path, "b", 1800)
    assert by_hours.spent() is None, "looked at again too early"
    clock.now += LOOK_EVERY_S
    assert by_hours.spent() == "budget.accelerator_hours of 1.5 is spent (1.5)"
    assert by_price.spent() is None
    held(tmp_path, "b", 1800 + 2400)
    clock.now += LOOK_EVERY_S
    assert by_price.spent() == "budget.price of 6.5 is spent (6.5)"


def test_a_price_counts_beside_an_earlier_start_that_had_none(tmp_path: Path) -> None:
    held(tmp_path, "a", 3600, price=None)
    clock = Clock()
    purse = Purse(Budget(price=2.5), tmp_path, ["a"], clock)
    held(tmp_path, "a", 3600, number=1)
    clock.now += LOOK_EVERY_S
    assert purse.spent() == "budget.price of 2.5 is spent (3)"


def test_wall_time_needs_no_ledger(tmp_path: Path) -> None:
    clock = Clock()
    purse = Purse(Budget(wall_hours=0.5), tmp_path, ["nothing yet"], clock)
    clock.now += 1799
    assert purse.spent() is None
    clock.now += 11
    assert purse.spent() == "budget.wall_hours of 0.5 is spent (0.503)"


def test_no_budget_is_never_spent(tmp_path: Path) -> None:
    clock = Clock()
    purse = Purse(Budget(), tmp_path, ["a"], clock)
    held(tmp_path, "a", 1e9)
    clock.now += 1e9
    assert purse.spent() is None


def test_a_price_needs_the_price_of_an_hour() -> None:
    with pytest.raises(BadExperiment, match=r"budget\.price needs compute\.price_per_hour"):
        load_experiment("default", ["budget.price=5"])
    assert load_experiment("default", ["budget.price=5", "compute.price_per_hour=2"]).budget.price == 5
    with pytest.raises(BadExperiment, match="greater than 0"):
        load_experiment("default", ["budget.wall_hours=0"])


def test_a_spent_budget_stops_running_cells_and_starts_no_other_but_finished_ones(
    cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    states = ("cached", "train", "train", "train")
    cells = [PlannedCell(cell_spec(seed=seed), state, "", "") for seed, state in enumerate(states)]  # type: ignore[arg-type]
    started: list[int] = []
    stop, is_spent = threading.Event(), threading.Event()
    pool = ThreadPoolExecutor(4)

    def work(cell: PlannedCell) -> CellOutcome:
        if cell.spec.seed == 2:
            is_spent.set()
            assert stop.wait(20)
            raise Cancelled("stopped")
        return CellOutcome(make_result(cell.spec, 0.5, 0.5), None, cell.spec.seed == 0, {})

    def start(cell: PlannedCell) -> Future[CellOutcome]:
        started.append(cell.spec.seed)
        return pool.submit(work, cell)

    outcomes = run_cells(
        cells, start, lambda _: {"CPU": 0.0, "GPU": 0.0}, stop, lambda: "it is spent" if is_spent.is_set() else None
    )
    assert started == [0, 1, 2]
    told = [str(outcome) if isinstance(outcome, BudgetSpent) else type(outcome).__name__ for _, outcome in outcomes]
    assert told == ["CellOutcome", "CellOutcome", "stopped at a checkpoint: it is spent", "not started: it is spent"]

    rows = make_rows(outcomes, set(), {})
    assert [row.state for row in rows] == ["cached", "trained", "stopped", "stopped"]
    assert "2 left for the next run, because the budget is spent" in spent(rows)
    message = str(Unfinished(Report(rows, [], {}, {})))
    assert message.startswith("0 of 4 cells failed, 2 are left for the next run. ")
    assert all(row.title in message for row in rows[2:])

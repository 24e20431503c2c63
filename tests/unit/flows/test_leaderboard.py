from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import pytest

from flows.cells import CellOutcome
from flows.leaderboard import (
    COLUMNS,
    Row,
    Summary,
    as_json,
    as_markdown,
    as_tables,
    make_rows,
    ordered,
    spent,
    summarise_seeds,
    unplanned_rows,
)
from flows.plan import Estimate, PlannedCell
from training.jobs import CellFailed
from training.ledger import Account, Ledger
from training.records import RunResult
from training.spec import ArchitectureSpec, RunSpec

Cell = tuple[PlannedCell, CellOutcome | Exception]


@pytest.fixture
def cells(cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]) -> list[Cell]:
    """Two datasets; the better cell comes second; one cell without any ground truth, one that failed."""

    def cell(spec: RunSpec, state: str, val_ap: float | None, test_ap: float | None, wall_s: float | None) -> Cell:
        outcome = CellOutcome(
            make_result(spec, val_ap, test_ap),
            f"run of {spec.run_key}",
            wall_s is None,
            {} if wall_s is None else {"wall": wall_s},
        )
        estimate = Estimate(4.0, 1, "probe") if state == "resume" else None
        return PlannedCell(spec, state, "", "", estimate=estimate), outcome  # type: ignore[arg-type]

    failure = CellFailed("Ray job 1-1 ended FAILED: the loss is not finite\nTraceback (most recent call last):\n  ...")
    failure.job_s = 36.0
    return [
        cell(cell_spec("yolox-nano", "zebras"), "train", 0.25, 0.5, 61.4),
        cell(cell_spec("yolox-nano", "apples"), "resume", 0.125, 0.75, 5.0),
        cell(cell_spec("yolox-tiny", "apples"), "cached", 0.5, 0.25, None),
        (PlannedCell(cell_spec("yolox-s", "apples", seed=3), "train", "", ""), failure),
        cell(cell_spec("yolox-m", "apples"), "train", None, None, 2.0),
    ]


def key(cell: Cell) -> str:
    return cell[0].spec.run_key


def ledger(held_s: float, useful_s: float, accelerator: Literal["CPU", "GPU"] = "CPU", **account: Any) -> Ledger:
    total = Account(held_s, useful_s, **({"num_starts": 2, "price": None} | account))
    return Ledger(accelerator, total, {1: total}, [total])


@pytest.fixture
def ledgers(cells: list[Cell]) -> dict[str, Ledger]:
    """Of the first four cells, by run key."""
    accounts = (ledger(72, 54), ledger(36, 9), ledger(720, 360), ledger(36, 0))
    return {key(cell): account for cell, account in zip(cells, accounts, strict=False)}


def test_order_is_dataset_then_the_mean_over_seeds_on_val(cells: list[Cell], ledgers: dict[str, Ledger]) -> None:
    rows = ordered(make_rows(cells, {f"run of {key(cells[2])}"}, ledgers))
    assert [(row.dataset, row.architecture, row.state) for row in rows] == [
        ("apples", "yolox-tiny", "cached"),
        ("apples", "yolox-nano", "resumed"),
        ("apples", "yolox-m", "trained"),
        ("apples", "yolox-s", "failed"),
        ("zebras", "yolox-nano", "trained"),
    ]
    assert [row.champion for row in rows] == [True, False, False, False, False]
    assert rows[0] == Row(
        "apples", "yolox-tiny", "yolox-tiny width=0.125", 0, key(cells[2]), "cached",
        val_ap=0.5, test_ap=0.25, test_ap50=0.625, trained_s=60.0, cpu_hours=0.2, useful_share=0.5, num_starts=2,
        champion=True,
    )  # fmt: skip
    assert (rows[1].wall_s, rows[1].estimated_s, rows[2].val_ap) == (5.0, 4.0, None)
    # What all attempts held, not what this run of 5 s did.
    assert (rows[1].cpu_hours, rows[1].useful_share, rows[1].gpu_hours) == (0.01, 0.25, 0.0)
    # Of a run from before there was a ledger nothing is known.
    assert (rows[2].cpu_hours, rows[2].useful_share, rows[2].num_starts) == (0.0, None, 0)


def test_a_failed_cell_says_why_in_one_line(cells: list[Cell], ledgers: dict[str, Ledger]) -> None:
    (failed,) = [row for row in make_rows(cells, set(), ledgers) if row.error is not None]
    assert failed.error == "Ray job 1-1 ended FAILED: the loss is not finite"
    assert (failed.seed, failed.run_key, failed.val_ap) == (3, key(cells[3]), None)
    # Its hour is as dear as any other.
    assert (failed.wall_s, failed.cpu_hours, failed.useful_share) == (36.0, 0.01, 0.0)
    (silent,) = make_rows([(cells[3][0], KeyError())], set(), {})
    assert (silent.error, silent.wall_s, silent.cpu_hours) == ("KeyError()", None, 0.0)


def test_a_dataset_without_a_version_fails_each_of_its_cells() -> None:
    architectures = [ArchitectureSpec(name="yolox-nano"), ArchitectureSpec(name="yolox-s", settings={"width": 0.25})]
    rows = unplanned_rows("pears", architectures, [0, 1], ValueError("no such folder\nfirst\nsecond"))
    assert [(row.title, row.state, row.error) for row in rows] == [
        (f"{name} / pears / seed {seed}", "failed", "no such folder")
        for name in ("yolox-nano", "yolox-s width=0.25") for seed in (0, 1)
    ]  # fmt: skip


@pytest.fixture
def seeds(cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]) -> list[Row]:
    """Three seeds, of which one failed, of one architecture, and one of another."""
    cells: list[Cell] = []
    for seed, ap in enumerate((0.25, 0.5, None)):
        spec = cell_spec("yolox-nano", "apples", seed=seed)
        outcome = CellFailed("killed") if ap is None else CellOutcome(make_result(spec, ap, ap / 2), "f", True, {})
        cells.append((PlannedCell(spec, "cached", "", ""), outcome))
    spec = cell_spec("yolox-tiny", "apples")
    cells.append((PlannedCell(spec, "cached", "", ""), CellOutcome(make_result(spec, 0.3, 0.3), "f", True, {})))
    return ordered(make_rows(cells, set(), {}))


def test_mean_and_spread_over_seeds_leave_out_the_failed_one(seeds: list[Row]) -> None:
    assert [row.architecture for row in seeds] == ["yolox-nano"] * 3 + ["yolox-tiny"]
    nano, tiny = summarise_seeds(seeds)
    assert (nano.num_seeds, nano.num_failed, tiny.num_seeds, tiny.spread) == (3, 1, 1, {})
    assert nano.mean["val_ap"] == pytest.approx(0.375)
    # The sample standard deviation of two values is their distance over the square root of two.
    assert nano.spread["val_ap"] == pytest.approx(0.25 / 2**0.5)
    assert nano.mean["test_ap"] == pytest.approx(0.1875)
    line = as_markdown(seeds).splitlines()[2]
    assert [text.strip() for text in line.strip("|").split("|")][:5] == [
        "apples", "yolox-nano depthwise=False width=0.125", "mean of 2", "0.375 ±0.177", "0.188 ±0.088",
    ]  # fmt: skip


def test_markdown_has_a_line_for_every_cell(cells: list[Cell], ledgers: dict[str, Ledger]) -> None:
    rows = ordered(make_rows(cells, {f"run of {key(cells[2])}"}, ledgers))
    table = [
        [text.strip() for text in line.removeprefix("|").removesuffix("|").split("|")]
        for line in as_markdown(rows).splitlines()
    ]
    assert table[0] == ["dataset", *COLUMNS]
    assert ({len(line) for line in table}, set(table[1])) == ({len(table[0])}, {"---"})
    assert [line[:3] for line in table[2:]] == [[row.dataset, row.label, str(row.seed)] for row in rows]
    by_name = dict(zip(table[0], table[2], strict=True))
    assert (by_name["val AP"], by_name["test AP"], by_name["AP50"], by_name["AP small"]) == (
        "0.500", "0.250", "0.625", "-",
    )  # fmt: skip
    assert (by_name["time"], by_name["state"], by_name[""]) == ("-", f"cached {key(cells[2])}", "champion")
    zebra = dict(zip(table[0], table[6], strict=True))
    assert (zebra["time"], zebra["estimated"], zebra["cost (useful)"]) == ("61 s", "-", "0.02 CPU-h (75%)")
    assert by_name["cost (useful)"] == "0.20 CPU-h (50%)"
    failed = dict(zip(table[0], table[5], strict=True))
    assert failed[""] == "Ray job 1-1 ended FAILED: the loss is not finite"


def test_the_terminal_has_a_table_for_each_dataset(cells: list[Cell]) -> None:
    rows = ordered(make_rows(cells, set(), {}))
    apples, zebras = as_tables(rows)
    assert (apples.row_count, zebras.row_count) == (4, 1)
    assert list(apples.columns[0].cells) == [row.label for row in rows if row.dataset == "apples"]


def test_what_was_spent_and_saved(cells: list[Cell], ledgers: dict[str, Ledger]) -> None:
    assert spent(make_rows(cells, set(), ledgers)) == (
        "5 cells: 3 trained in 68 cell-seconds; 1 reused, which saved 60 s; 1 failed after 36 s; "
        "cost of all attempts (useful): 0.24 CPU-h (49%)"
    )
    never_ran = [(cells[3][0], CellFailed("no room"))]
    assert spent(make_rows(never_ran, set(), {})) == "1 cell: 1 failed"
    assert spent(make_rows(cells[1:2], set(), {})) == "1 cell: 1 trained in 5 cell-seconds (estimated 4 s)"


def test_a_price_is_shown_where_all_is_paid_for(cells: list[Cell]) -> None:
    paid = {
        key(cells[0]): ledger(3600, 1800, price=2.0),
        key(cells[1]): ledger(1800, 1800, "GPU", price=5.5),
        key(cells[2]): ledger(1800, 0, "GPU", price=0.25),
    }
    assert spent(make_rows(cells[:3], set(), paid)).endswith("7.75 for 1.00 GPU-h (50%)")
    table = as_markdown(make_rows(cells[:3], set(), paid)).splitlines()
    costs = [line.split("|")[-4].strip() for line in table]
    assert costs[2:] == ["0.25 for 0.50 GPU-h (0%)", "5.50 for 0.50 GPU-h (100%)", "2.00 for 1.00 CPU-h (50%)"]
    unpaid = paid | {key(cells[2]): ledger(1800, 0, "GPU")}
    assert spent(make_rows(cells[:3], set(), unpaid)).endswith("(useful): 1.00 GPU-h (50%)")


def test_json_gives_every_field_back(cells: list[Cell], seeds: list[Row]) -> None:
    content = json.loads(json.dumps(as_json(seeds), allow_nan=False))
    assert [Row(**row) for row in content["rows"]] == seeds
    assert [Summary(**each) for each in content["summary"]] == summarise_seeds(seeds)

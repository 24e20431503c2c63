from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flows.cells import CellOutcome, PlannedCell
from flows.leaderboard import COLUMNS, Row, as_json, as_markdown, as_table, make_rows
from training.jobs import CellFailed
from training.records import RunResult
from training.spec import RunSpec

Cell = tuple[PlannedCell, CellOutcome | Exception]


@pytest.fixture
def cells(cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]) -> list[Cell]:
    """Two datasets; the better cell comes second; one cell without any ground truth, one that failed."""

    def cell(spec: RunSpec, state: str, val_ap: float | None, test_ap: float | None, wall_s: float | None) -> Cell:
        outcome = CellOutcome(
            make_result(spec, val_ap, test_ap), "f00", wall_s is None, {} if wall_s is None else {"wall": wall_s}
        )
        return PlannedCell(spec, state, "", ""), outcome  # type: ignore[arg-type]

    failure = CellFailed("Ray job 1-1 ended FAILED: the loss is not finite\nTraceback (most recent call last):\n  ...")
    return [
        cell(cell_spec("yolox-nano", "zebras"), "train", 0.25, 0.5, 61.4),
        cell(cell_spec("yolox-nano", "apples"), "resume", 0.125, 0.75, 5.0),
        cell(cell_spec("yolox-tiny", "apples"), "cached", 0.5, 0.25, None),
        (PlannedCell(cell_spec("yolox-s", "apples", seed=3), "train", "", ""), failure),
        cell(cell_spec("yolox-m", "apples"), "train", None, None, 2.0),
    ]


def key(cell: Cell) -> str:
    return cell[0].spec.run_key


def test_rows_go_by_dataset_and_then_by_validation_score(cells: list[Cell]) -> None:
    rows = make_rows(cells, {key(cells[2])})
    assert [(row.dataset, row.architecture, row.state) for row in rows] == [
        ("apples", "yolox-tiny", "cached"),
        ("apples", "yolox-nano", "resumed"),
        ("apples", "yolox-s", "failed"),
        ("apples", "yolox-m", "trained"),
        ("zebras", "yolox-nano", "trained"),
    ]
    assert [row.champion for row in rows] == [True, False, False, False, False]
    assert rows[0] == Row(
        "apples", "yolox-tiny", 0, key(cells[2]), "cached", val_ap=0.5, test_ap=0.25, test_ap50=0.625, champion=True
    )
    assert (rows[1].wall_s, rows[3].val_ap, rows[3].error) == (5.0, None, None)


def test_a_failed_cell_says_why_in_one_line(cells: list[Cell]) -> None:
    (failed,) = [row for row in make_rows(cells, set()) if row.error is not None]
    assert failed.error == "Ray job 1-1 ended FAILED: the loss is not finite"
    assert (failed.seed, failed.run_key, failed.val_ap) == (3, key(cells[3]), None)
    (silent,) = make_rows([(cells[3][0], KeyError())], set())
    assert silent.error == "KeyError()"


def test_markdown_is_a_table_of_the_same_cells(cells: list[Cell]) -> None:
    rows = make_rows(cells, {key(cells[2])})
    table = [
        [text.strip() for text in line.removeprefix("|").removesuffix("|").split("|")]
        for line in as_markdown(rows).splitlines()
    ]
    assert {len(line) for line in table} == {len(COLUMNS)}
    assert (table[0], set(table[1])) == (list(COLUMNS), {"---"})
    assert [line[:3] for line in table[2:]] == [[row.dataset, row.architecture, str(row.seed)] for row in rows]
    by_name = dict(zip(COLUMNS, table[2], strict=True))
    assert (by_name["val AP"], by_name["test AP"], by_name["AP50"], by_name["AP small"]) == (
        "0.500", "0.250", "0.625", "-",
    )  # fmt: skip
    assert (by_name["time"], by_name["state"], by_name[""]) == ("-", f"cached {key(cells[2])}", "champion")
    assert dict(zip(COLUMNS, table[6], strict=True))["time"] == "61 s"


def test_the_terminal_table_has_the_same_rows(cells: list[Cell]) -> None:
    rows = make_rows(cells, set())
    table = as_table(rows)
    assert table.row_count == len(rows)
    assert list(table.columns[1].cells) == [row.architecture for row in rows]


def test_json_gives_every_field_back(cells: list[Cell]) -> None:
    rows = make_rows(cells, {key(cells[2])})
    assert [Row(**row) for row in json.loads(json.dumps(as_json(rows), allow_nan=False))] == rows

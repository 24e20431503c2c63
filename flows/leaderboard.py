"""The comparison of all cells: a table for the terminal, JSON for programs, Markdown for Prefect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from flows.cells import CellOutcome, PlannedCell

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("dataset", "architecture", "seed", "val AP", "test AP", "AP50", "AP small", "time", "state", "")


@dataclass(frozen=True)
class Row:
    """One cell: scores are COCO's, on test unless the name says val; `error` says why there are none."""

    dataset: str
    architecture: str
    seed: int
    run_key: str
    state: str
    val_ap: float | None = None
    test_ap: float | None = None
    test_ap50: float | None = None
    test_ap_small: float | None = None
    wall_s: float | None = None
    champion: bool = False
    error: str | None = None


def make_rows(cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]], champions: set[str]) -> list[Row]:
    """One row a cell, by dataset and then by validation AP, best first."""
    rows = []
    for cell, outcome in cells:
        spec = cell.spec
        named = {"dataset": spec.dataset.name, "architecture": spec.architecture.name, "seed": spec.seed}
        if isinstance(outcome, Exception):
            error = str(outcome).strip().splitlines()
            rows.append(Row(**named, run_key=spec.run_key, state="failed", error=error[0] if error else repr(outcome)))  # type: ignore[arg-type]
            continue
        val, test = outcome.result.scores["val"].metrics, outcome.result.scores["test"].metrics
        rows.append(
            Row(
                **named,  # type: ignore[arg-type]
                run_key=spec.run_key,
                state="cached" if outcome.reused else ("resumed" if cell.state == "resume" else "trained"),
                val_ap=val["coco/AP"],
                test_ap=test["coco/AP"],
                test_ap50=test["coco/AP50"],
                test_ap_small=test["coco/AP_small"],
                wall_s=outcome.seconds.get("wall"),
                champion=spec.run_key in champions,
            )
        )
    return sorted(rows, key=lambda row: (row.dataset, -(row.val_ap if row.val_ap is not None else -1.0)))


def as_table(rows: Sequence[Row]) -> Table:
    """A table for the terminal."""
    from rich.table import Table

    table = Table(title="Leaderboard (COCO protocol; selected on val, promoted on test)", title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if 2 <= index <= 7 else "left")
    for row in rows:
        table.add_row(*_texts(row))
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(_texts(row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Plain values."""
    return [asdict(row) for row in rows]


def _texts(row: Row) -> list[str]:
    scores = [_score(value) for value in (row.val_ap, row.test_ap, row.test_ap50, row.test_ap_small)]
    time = "-" if row.wall_s is None else f"{row.wall_s:.0f} s"
    remark = "champion" if row.champion else ""
    return [row.dataset, row.architecture, str(row.seed), *scores, time, f"{row.state} {row.run_key}", remark]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

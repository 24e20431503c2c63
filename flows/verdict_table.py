"""A verdict as people read it: in the terminal, in Prefect and beside the version in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracking.promotion import GateRow

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("gate", "asked", "champion", "candidate", "")


def as_markdown(gates: Sequence[GateRow], headline: str) -> str:
    """The headline and one row a gate."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *_rows(gates)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return f"{headline}\n\n{table}\n"


def as_table(gates: Sequence[GateRow], title: str) -> Table:
    """One row a gate, for the terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in _rows(gates):
        table.add_row(*row)
    return table


def _rows(gates: Sequence[GateRow]) -> list[tuple[str, ...]]:
    return [(row.gate, row.threshold, row.champion, row.candidate, "pass" if row.passed else "FAIL") for row in gates]

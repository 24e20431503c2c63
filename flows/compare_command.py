"""`speck compare`: is one finished run better than another, or did the pictures that it was scored on fall that way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from evaluation.significance import Comparison


def compare_command(
    run_a: Annotated[str, typer.Argument(help="Run key of a finished run, or its beginning.")],
    run_b: Annotated[str, typer.Argument(help="The run that is compared with it.")],
    split: Annotated[Literal["val", "test"], typer.Option(help="Split that both are scored on.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Samples of images that both are scored on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for a page that shows where they differ, and the JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two finished runs' scores on one split by paired bootstrap: differences with 95% intervals."""
    from flows.compare import compare_runs, notes_on
    from flows.evaluate import find_result
    from flows.settings import Settings

    settings = Settings()
    first, second = (find_result(run, settings) for run in (run_a, run_b))
    compared = compare_runs(first, second, settings, split, num_samples=samples, seed=seed, out=out)
    if as_json:
        print_json(compared.as_json())
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, result in (("A", first), ("B", second)):
        typer.echo(f"{name}: {result.spec.title}, run {result.run_key}")
    dataset = first.spec.dataset
    console.print(as_table(compared.comparison, f"{dataset.name} {dataset.version[:12]} {split}"))
    for note in notes_on(compared):
        typer.echo(note)


def as_table(comparison: Comparison, title: str) -> Table:
    """One row a metric, then one a class and metric; differences are B less A."""
    from rich.table import Table

    from flows.compare import rows_of

    interval = f"{comparison.confidence:.0%}"
    table = Table(title=title)
    for column in ("metric", "A", "B", "B - A", f"{interval} interval", "B higher in", "B is"):
        table.add_column(column, justify="left" if column in {"metric", "B is"} else "right")
    for name, found in rows_of(comparison):
        if found.first is None or found.second is None or found.difference is None:
            table.add_row(name, "-", "-", "", "", "", "no ground truth")
            continue
        bounds = "" if found.low is None or found.high is None else f"{found.low:+.4f} to {found.high:+.4f}"
        share = "" if found.share_better is None else f"{found.share_better:.1%}"
        table.add_row(
            name, f"{found.first:.4f}", f"{found.second:.4f}", f"{found.difference:+.4f}", bounds, share,
            found.verdict or "",
        )  # fmt: skip
    return table

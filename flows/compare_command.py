"""`speck compare`: is one finished run better than another, or did the pictures fall that way; and what made it so."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from evaluation.significance import Comparison
    from flows.differences import Fact
    from flows.pairing import Pair
    from flows.settings import Settings


def compare_command(
    dataset: Annotated[str, typer.Argument(help="Dataset that both were trained on.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_A RUN_B]",
            help="Run keys of two finished runs, or their beginnings; without, the champion and the best other by val.",
        ),
    ] = None,
    split: Annotated[Literal["val", "test"], typer.Option(help="Split that both are scored on.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Samples of images that both are scored on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for a page that shows where they differ, and the JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two finished runs: scores with 95% intervals by paired bootstrap, parameters, data, code and cost."""
    from flows.compare import compare_runs, notes_on
    from flows.settings import Settings

    settings = Settings()
    pair = _pair(dataset, runs or [], settings, split)
    compared = compare_runs(pair.first, pair.second, settings, split, num_samples=samples, seed=seed, out=out)
    if as_json:
        print_json({"why": pair.why, **compared.as_json()})
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    typer.echo(pair.why)
    for name, result in (("A", pair.first), ("B", pair.second)):
        typer.echo(f"{name}: {result.spec.title}, run {result.run_key}")
    version = pair.first.spec.dataset.version
    console.print(as_table(compared.comparison, f"{dataset} {version[:12]} {split}"))
    console.print(facts_table(compared.facts))
    for note in notes_on(compared):
        typer.echo(note)
    if out is not None:
        typer.echo(f"where they differ, in pictures: {out / 'comparison.html'}")


def _pair(dataset: str, runs: Sequence[str], settings: Settings, split: Literal["val", "test"]) -> Pair:
    from flows.evaluate import find_result
    from flows.pairing import Pair, pair_of

    if not runs:
        return pair_of(dataset, settings, split)
    if len(runs) != 2:
        raise typer.BadParameter("name two runs after their dataset, or the dataset alone", param_hint="[RUN_A RUN_B]")
    first, second = (find_result(run, settings) for run in runs)
    for run in (first, second):
        if run.spec.dataset.name != dataset:
            raise typer.BadParameter(
                f"run {run.run_key} is of {run.spec.dataset.name}, not of {dataset}", param_hint="DATASET"
            )
    return Pair(first, second, "the runs that were named")


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


def facts_table(facts: Mapping[str, Sequence[Fact]]) -> Table:
    """One row a fact, kind by kind."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what differs beside the scores, and what it cost")
    for column in ("", "", "A", "B"):
        table.add_column(column, overflow="fold")
    for kind, found in facts.items():
        for place, fact in enumerate(found):
            # As it is: brackets in a value are no markup.
            table.add_row("" if place else kind, *(Text(cell) for cell in fact))
        if not found:
            table.add_row(kind, "all the same")
    return table

"""`speck data`: import, check, list."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.output import JsonOption, print_json

data_app = typer.Typer(help="Datasets: import, check, list.", no_args_is_help=True)


@data_app.command("import")
def import_command(
    name: str,
    path: Annotated[Path, typer.Argument(help="Folder with images/ and annotations/{train,val,test}.json.")],
    format: Annotated[str, typer.Option(help="Label format: coco.")] = "coco",
    licence: Annotated[str, typer.Option(help="Licence of the images, kept with every model.")] = "unknown",
) -> None:
    """Register a dataset where it lies: a card in data/catalog, a link in data/raw, a line in params.yaml."""
    from data.importing import register
    from flows.settings import REPO

    if format != "coco":
        raise typer.BadParameter(f"{format!r} cannot be imported; known: coco", param_hint="--format")
    card = register(name, path, "coco", repo=REPO, licence=licence)
    typer.echo(
        f"{card.name}: {len(card.classes)} classes ({', '.join(card.classes)}); check it: speck data check {name}"
    )


@data_app.command()
def check(name: str, as_json: JsonOption = False) -> None:
    """List everything that is wrong with a dataset; exit code 1 if there are errors."""
    from data.checking import check as problems_of
    from flows.settings import REPO

    problems = problems_of(name, REPO)
    errors = sum(problem.severity == "error" for problem in problems)
    if as_json:
        print_json([asdict(problem) for problem in problems])
    else:
        for problem in problems:
            typer.echo(str(problem))
        typer.echo(f"{name}: {errors} errors, {len(problems) - errors} warnings")
    if errors:
        raise typer.Exit(1)


@data_app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """Show every dataset with its version and counts."""
    from data.summary import summaries
    from flows.settings import REPO

    found = summaries(REPO)
    if as_json:
        print_json([asdict(summary) for summary in found])
        return
    for summary in found:
        images = " ".join(f"{split} {count}" for split, count in summary.num_images.items()) or "not prepared here"
        boxes = "" if summary.num_boxes is None else f", {summary.num_boxes} boxes"
        size = "" if summary.size_bytes is None else f", {summary.size_bytes / 2**20:.0f} MiB"
        typer.echo(f"{summary.name:20} {summary.version or 'no version yet':32}  {images}{boxes}{size}")

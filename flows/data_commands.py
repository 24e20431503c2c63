"""`speck data`: import, check, list, report."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from data.importing import Format

data_app = typer.Typer(help="Datasets: import, check, list, report.", no_args_is_help=True)


@data_app.command("import")
def import_command(
    name: str,
    path: Annotated[str, typer.Argument(help="Folder, .zip or .tar archive, or s3://bucket/prefix.")],
    format: Annotated[str, typer.Option(help="Label format: auto, coco, voc, yolo, visdrone or uavdt.")] = "auto",
    licence: Annotated[str | None, typer.Option(help="Licence of the images, kept with every model.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the data into data/raw instead of linking it.")] = False,
) -> None:
    """Register a dataset where it lies or as a copy: data/raw/NAME, a card in data/catalog, a line in params.yaml.

    Archives and what comes from S3 are copied. Splits that the files lack are divided by the pictures' content; see
    `splits` in the card. Known by name, with classes, protocol and expected counts: neu-det, visdrone, uavdt,
    tinyindus.
    """
    from data.card import did_you_mean
    from data.importing import FORMATS, register
    from flows.settings import REPO

    if format not in FORMATS:
        hint = did_you_mean(format, FORMATS)
        raise typer.BadParameter(f"{format!r} is not known.{hint} Known: {', '.join(FORMATS)}", param_hint="--format")
    card, notes = register(name, path, cast("Format", format), repo=REPO, licence=licence, copy=copy)
    for note in notes:
        typer.echo(note)
    typer.echo(
        f"{card.name}: {len(card.classes)} classes ({', '.join(card.classes)}); check it: speck data check {name}"
    )


@data_app.command()
def check(
    name: str,
    fix: Annotated[bool, typer.Option("--fix", help="First put right, in a copy, what can be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List everything that is wrong with a dataset; exit code 1 if there are errors.

    --fix replaces data/raw/NAME by a corrected copy; where it was a link, the folder that it led to keeps its bytes.
    Put right are wrong suffixes (but for YOLO), EXIF orientation tags, more than 8 bits a channel and transparency,
    and in COCO files boxes that stick out, have no area or are repeated, and repeated annotation ids. Pictures keep
    their pixels as training reads them, and their split. The rest, which needs a person, is listed.
    """
    from data.checking import check as problems_of
    from data.fixing import fix as fix_dataset
    from flows.settings import REPO

    fixed = fix_dataset(name, REPO) if fix else None
    problems = problems_of(name, REPO)
    errors = sum(problem.severity == "error" for problem in problems)
    if as_json:
        found = [asdict(problem) for problem in problems]
        print_json(found if fixed is None else {"fixed": fixed, "problems": found})
    else:
        for problem in problems:
            typer.echo(str(problem))
        if fixed is not None:
            counts = ", ".join(f"{kind} {number}" for kind, number in fixed.items())
            typer.echo(f"{name}: fixed in a copy: {counts}" if counts else f"{name}: there was nothing to fix")
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


@data_app.command()
def report(name: str, as_json: JsonOption = False) -> None:
    """Bring a dataset up to date and write what its version holds as a page and as JSON."""
    from data.report import HTML, report_folder, summary, write_report
    from data.versioning import version_dataset
    from flows.settings import REPO

    version = version_dataset(name, REPO).version
    written = write_report(name, version, REPO)
    if as_json:
        print_json(asdict(written))
        return
    for line in summary(written):
        typer.echo(line)
    typer.echo(str(report_folder(name, version, REPO) / HTML))

"""`speck data`: import, check, report, and versions: list, diff, restore, push, pull."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from data.importing import Format

data_app = typer.Typer(help="Datasets: import, check, report, and their versions.", no_args_is_help=True)


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
        print_json({"fixed": fixed or {}, "errors": errors, "problems": [asdict(problem) for problem in problems]})
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
    """Show every dataset with its version and counts, and whether the DVC remote has the version."""
    from dataclasses import replace

    from data.remote import remote_states
    from data.summary import summaries
    from flows.settings import REPO

    found = summaries(REPO)
    states, why = remote_states({summary.name: summary.version for summary in found}, REPO)
    found = [replace(summary, remote=states[summary.name]) for summary in found]
    if why:
        typer.echo(why, err=True)
    if as_json:
        print_json([asdict(summary) for summary in found])
        return
    for summary in found:
        images = " ".join(f"{split} {count}" for split, count in summary.num_images.items()) or "not prepared here"
        boxes = "" if summary.num_boxes is None else f", {summary.num_boxes} boxes"
        size = "" if summary.size_bytes is None else f", {summary.size_bytes / 2**20:.0f} MiB"
        where = "" if summary.version is None else f", {summary.remote}"
        typer.echo(f"{summary.name:20} {summary.version or 'no version yet':32}  {images}{boxes}{size}{where}")


VersionArgument = Annotated[str, typer.Argument(help="Version, its beginning, or `current`.")]
NamesArgument = Annotated[list[str] | None, typer.Argument(help="Datasets; all that have a version without.")]


@data_app.command()
def diff(name: str, before: VersionArgument, now: VersionArgument, as_json: JsonOption = False) -> None:
    """Show what changed between two versions: images, and boxes by class."""
    from data.compare import compare
    from flows.settings import REPO

    change = compare(name, before, now, REPO)
    if as_json:
        print_json(asdict(change))
        return
    for what, count in change.num_images.items():
        examples = change.examples.get(what, [])
        more = ", ..." if count > len(examples) else ""
        typer.echo(f"images {what:10} {count:>8}{'  ' if examples else ''}{', '.join(examples)}{more}")
    for label, (then, after) in change.objects_per_class.items():
        typer.echo(f"boxes  {label:20} {then:>8} -> {after:<8} {after - then:+}")


@data_app.command()
def restore(name: str, version: VersionArgument) -> None:
    """Bring a version back into data/processed and dvc.lock."""
    from data.restore import restore as bring_back
    from flows.settings import REPO

    with _announced(name):
        restored = bring_back(name, version, REPO)
    typer.echo(f"{name}: data/processed/{name} and dvc.lock hold version {restored.version}")
    if restored.changed_deps:
        typer.echo(
            f"{name}: these are not as they were for that version, so preparing, as train-all does, leads away from it "
            f"again: {', '.join(restored.changed_deps)}"
        )


@data_app.command()
def push(names: NamesArgument = None) -> None:
    """Send datasets' versions to the DVC remote; without names, all that are in this repository's cache."""
    from data.remote import is_cached
    from data.remote import push as send
    from flows.settings import REPO

    chosen = names or [name for name in _versioned() if is_cached(name, REPO)]
    _each(chosen, lambda name: f"version {send(name, REPO)} is in the remote")


@data_app.command()
def pull(names: NamesArgument = None) -> None:
    """Fetch the versions that dvc.lock records from the DVC remote, and put them into data/processed.

    Without names, all that the remote has.
    """
    from data.remote import IN_REMOTE, require_remote_states
    from data.remote import pull as fetch
    from flows.settings import REPO

    if not names:
        states = require_remote_states(_versioned(), REPO)
        names = [name for name, state in states.items() if state == IN_REMOTE]
        for name in states.keys() - {*names}:
            typer.echo(f"{name}: {states[name]}")
    _each(names, lambda name: f"data/processed/{name} holds version {fetch(name, REPO)}")


def _versioned() -> dict[str, str]:
    """Version by dataset, of those that have one."""
    from data.card import card_names
    from data.versioning import current_version
    from flows.settings import REPO

    found = {name: current_version(name, REPO) for name in card_names(REPO / "data" / "catalog")}
    return {name: version.version for name, version in found.items() if version is not None}


@contextmanager
def _announced(name: str) -> Iterator[None]:
    """Let the Prefect server that the environment names know if the dataset has another version after this block."""
    from data.versioning import current_version
    from flows.settings import REPO

    before = current_version(name, REPO)
    yield
    now = current_version(name, REPO)
    if "PREFECT_API_URL" in os.environ and now is not None and (before is None or before.version != now.version):
        from flows.events import dataset_changed

        dataset_changed(name, now.version, "" if before is None else before.version)


def _each(names: list[str], action: Callable[[str], str]) -> None:
    """Do it for every dataset, whatever becomes of the others; exit code 1 if one failed."""
    from data.objects import StoreError
    from data.versioning import VersioningFailed

    failed = False
    for name in names:
        try:
            typer.echo(f"{name}: {action(name)}")
        except (StoreError, VersioningFailed) as error:
            failed = True
            typer.echo(f"{name}: {type(error).__name__}: {error}", err=True)
    if failed:
        raise typer.Exit(1)


@data_app.command()
def report(name: str, as_json: JsonOption = False) -> None:
    """Bring a dataset up to date and write what its version holds as a page and as JSON."""
    from data.report import HTML, report_folder, summary, write_report
    from data.versioning import version_dataset
    from flows.settings import REPO

    with _announced(name):
        version = version_dataset(name, REPO).version
    written = write_report(name, version, REPO)
    if as_json:
        print_json(asdict(written))
        return
    for line in summary(written):
        typer.echo(line)
    typer.echo(str(report_folder(name, version, REPO) / HTML))

"""`speck reproduce`: train a registered version again and compare."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from flows.reproduce import Reproduced

DIFFERS = 3


def reproduce(
    model: Annotated[
        str, typer.Argument(metavar="DATASET@VERSION", help="VERSION: a number, champion, challenger or previous.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Train a registered version again by its code, on its data, and compare; exit code 3 if the weights differ."""
    asked = re.fullmatch(r"(?P<dataset>[^@/]+)@(v(?=[0-9]))?(?P<version>[^@/]+)", model)
    if asked is None:
        raise typer.BadParameter(f"{model!r} must be DATASET@VERSION, as in sample-aerial@champion or sample-aerial@3")
    from flows.find_model import find_version
    from flows.reproduce import reproduce_version
    from flows.settings import Settings
    from tracking.client import connect

    settings = Settings()
    client = connect(settings.tracking_uri)
    version = find_version(client, asked["dataset"], asked["version"], settings)
    found = reproduce_version(client, asked["dataset"], version, settings, partial(typer.echo, err=True))
    if as_json:
        print_json(_as_json(found))
    else:
        _print(found)
    if not found.is_identical:
        raise typer.Exit(DIFFERS)


def _print(found: Reproduced) -> None:
    typer.echo(f"{'':28} {'recorded':>12} {'reproduced':>12} {'difference':>12}")
    for name, (old, new) in found.scores.items():
        typer.echo(f"{name:28} {_row(old, new)}")
    for step, (old, new) in found.losses.items():
        typer.echo(f"{f'loss at step {step}':28} {_row(old, new)}")
    weights = found.weights
    if found.is_identical:
        typer.echo(f"weights: all {weights.num_tensors} tensors are the same, bit by bit")
    else:
        most = "names, shapes or types, too"
        if weights.largest_difference is not None:
            most = f"by {weights.largest_difference:.3g} at most"
        typer.echo(f"weights: {weights.num_different} of {weights.num_tensors} tensors differ, {most}")
    typer.echo(f"the second training lies in {found.run_folder}; `speck gc` frees it")


def _row(old: float | None, new: float | None) -> str:
    shown = [f"{'-' if value is None else format(value, '.6f'):>12}" for value in (old, new)]
    difference = "" if old is None or new is None else "0" if old == new else f"{new - old:+.3g}"
    return f"{' '.join(shown)} {difference:>12}"


def _as_json(found: Reproduced) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(found) | {"is_identical": found.is_identical}

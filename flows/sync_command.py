"""`speck sync`: what MLflow missed while it was away."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.output import JsonOption, print_json


def sync_command(
    run_keys: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN_KEY]...", help="Runs, or the beginnings of their keys.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send MLflow what it lacks of runs in storage, of all of them without RUN_KEY; once more changes nothing."""
    from dataclasses import asdict

    from flows.mirror import pull_all
    from flows.settings import Settings
    from flows.sync import sync, trainings
    from tracking.client import connect

    settings = Settings()
    pull_all(settings)
    folders = trainings(settings, run_keys or ())
    synced = []
    for one in sync(connect(settings.tracking_uri), folders, restores=bool(run_keys)):
        synced.append(one)
        if not as_json:
            typer.echo(f"{one.training:14} {one.title}: {one.outcome}")
    if as_json:
        print_json([asdict(one) for one in synced])
    elif not synced:
        typer.echo(f"there is no run in {settings.storage_url or settings.storage}; train one with `speck train`")
    if any(one.is_failed for one in synced):
        raise typer.Exit(1)

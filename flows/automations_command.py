"""`speck automations`: what Prefect does by itself about Speck's flows."""

from __future__ import annotations

import os

import typer


class NoServer(RuntimeError):
    """Automations live on a server, and none is named."""


def automations() -> None:
    """Put the automations on the Prefect server: retrain on changed data, mark dead runs, notify SPECK_WEBHOOK_URL."""
    from flows.settings import Settings

    if "PREFECT_API_URL" not in os.environ:
        raise NoServer(
            "PREFECT_API_URL names no Prefect server, and without one nothing watches; see docs/operations.md"
        )
    from flows.automations import apply

    url = Settings().webhook_url
    applied = apply(None if url is None else url.get_secret_value())
    for what, names in applied._asdict().items():
        for name in names:
            typer.echo(f"{what}: {name}")
    if url is None:
        typer.echo("nobody is notified: set SPECK_WEBHOOK_URL, and run this again")

"""`speck rollback`: an earlier champion becomes champion again."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.output import JsonOption, print_json


def rollback(
    dataset: str,
    why: Annotated[str, typer.Option(help="The reason, for the ledger.")],
    to: Annotated[int | None, typer.Option(help="A former champion's version; default: the previous one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an earlier champion champion again, at once and without gates; the ledger keeps who did it and why."""
    from dataclasses import asdict

    from data.card import load_card
    from flows.rollback import roll_back
    from flows.settings import Settings
    from tracking.client import connect

    load_card(dataset)
    settings = Settings()
    entry = roll_back(connect(settings.tracking_uri), settings, dataset, to=to, why=why)
    if as_json:
        print_json(asdict(entry))
        return
    before = "none" if entry.previous is None else f"v{entry.previous}"
    typer.echo(f"{dataset}: v{entry.champion} is champion again (decision {entry.generation}), previous is {before}")

"""`speck promote`: whether a run becomes champion, by its dataset's gates."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from flows.promote import Promotion


class NotPromoted(RuntimeError):
    """The run did not become champion; the message says why."""


def promote(
    dataset: Annotated[str, typer.Argument(help="Dataset whose champion is challenged.")],
    run: Annotated[
        str | None, typer.Option(help="Run key or its beginning; default: the best on val, on the current data.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the verdict and change nothing.")] = False,
    approve: Annotated[bool, typer.Option("--approve", help="Agree, where the gates want a person to.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a finished run challenge a dataset's champion; exit code 1 if it does not pass every gate."""
    from dataclasses import asdict

    from data.card import load_card
    from flows.load_gates import load_gates
    from flows.promote import Approval, automatic, find_candidate, promote_run
    from flows.settings import Settings
    from tracking.client import connect

    settings = Settings()
    gates = load_gates(load_card(dataset))
    result = find_candidate(dataset, run, settings, gates)
    promotion = promote_run(
        connect(settings.tracking_uri), result, settings, gates,
        (lambda *_: Approval(True, "approved on the command line")) if approve else automatic,
        lambda line: typer.echo(line, err=True),
        dry_run=dry_run,
    )  # fmt: skip
    if promotion.outcome == "promoted" and "PREFECT_API_URL" in os.environ:
        from flows.events import promoted

        promoted(promotion)
    if as_json:
        print_json(asdict(promotion))
    else:
        _print(promotion, result.spec.title)
    if promotion.outcome in ("rejected", "waits for approval"):
        raise NotPromoted(_ending(promotion))


def _print(promotion: Promotion, title: str) -> None:
    from rich.console import Console

    from flows.verdict_table import as_table

    if promotion.verdict is not None:
        version = "" if promotion.version is None else f", version {promotion.version}"
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(as_table(promotion.verdict.rows, f"{title}, run {promotion.run_key}{version}"))
    if promotion.num_left_out:
        typer.echo(f"left out for both: {promotion.num_left_out} test pictures that the champion was trained on")
    if promotion.outcome not in ("rejected", "waits for approval"):
        typer.echo(f"{promotion.dataset}: {promotion.outcome}{_generation(promotion)}: {promotion.reason}")


def _ending(promotion: Promotion) -> str:
    approve = f"; {promotion.how_to_approve}" if promotion.is_open else ""
    return f"{promotion.dataset}: {promotion.outcome}{_generation(promotion)}: {promotion.reason}{approve}"


def _generation(promotion: Promotion) -> str:
    return "" if promotion.generation is None else f" as generation {promotion.generation}"

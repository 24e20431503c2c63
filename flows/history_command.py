"""`speck history`: what was decided about a dataset's models, by whom, when and why."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from tracking.authority import Entry
    from tracking.registry import Version


def history(
    dataset: str,
    gates: Annotated[bool, typer.Option("--gates", help="With the table of each decision's gates.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every decision about a dataset's models, newest first: who, when, why; and the versions in the registry."""
    from dataclasses import asdict

    from data.card import load_card
    from flows.decisions import decisions
    from flows.settings import Settings
    from tracking.client import connect
    from tracking.registry import history as versions_of

    load_card(dataset)
    settings = Settings()
    client = connect(settings.tracking_uri)
    entries = decisions(client, settings, dataset)[::-1]
    versions = versions_of(client, dataset)
    if as_json:
        print_json({"decisions": [asdict(e) for e in entries], "versions": [asdict(v) for v in versions]})
        return
    if not versions:
        typer.echo(f"no model of {dataset} is registered yet; run `speck train-all`")
    for entry in entries:
        typer.echo(_line(entry))
        if gates and entry.gates:
            _print_table(_gates(entry))
    for version in versions:
        typer.echo(_version_line(version, entries))


def _line(entry: Entry) -> str:
    when = datetime.fromtimestamp(entry.at_ms / 1000).astimezone().isoformat(" ", "minutes")
    looks = f", look {entry.looks_at_test} at test" if entry.action in ("promoted", "rejected") else ""
    champion = "none" if entry.champion is None else f"v{entry.champion}"
    return (
        f"{entry.generation:>4}  {when}  v{entry.version} {entry.action} by {entry.who} "
        f"(data {entry.dataset_version[:12]}{looks}); champion {champion}: {entry.why}"
    )


def _gates(entry: Entry) -> Table:
    from rich.table import Table

    table = Table()
    titles = list(dict.fromkeys(title for row in entry.gates for title in row))
    for title in titles:
        table.add_column(title)
    for row in entry.gates:
        table.add_row(*(_cell(row.get(title, "")) for title in titles))
    return table


def _cell(value: str | bool) -> str:
    return ("yes" if value else "NO") if isinstance(value, bool) else value


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _version_line(version: Version, entries: Sequence[Entry]) -> str:
    score = version.scores.get("test/coco/AP")
    is_decided = any(entry.version == version.version for entry in entries)
    aliases = f" [{', '.join(version.aliases)}]" if version.aliases else ""
    return (
        f"v{version.version:<3} {version.architecture:16} run {version.run_key} data {version.dataset_version[:12]} "
        f"AP {'-' if score is None else f'{score:.3f}'}{aliases}{'' if is_decided else '  undecided'}"
    )

"""The ledger of promotions, as commands and flows consult it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer
from pydantic import TypeAdapter

from flows.settings import Settings
from flows.verdict_table import as_markdown
from tracking.authority import Entry, consult, open_authority
from tracking.promotion import GateRow
from tracking.registry import Version, history, record_verdict, show_verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient


def on_stderr(line: str) -> None:
    """For whoever typed a command, beside what it prints."""
    typer.echo(line, err=True)


def decisions(
    client: MlflowClient, settings: Settings, dataset: str, tell: Callable[[str], object] = on_stderr
) -> list[Entry]:
    """What was decided about a dataset's models, oldest first; MLflow's aliases and verdicts agree with it afterwards.

    `tell` hears of each alias that did not. Raises what `tracking.authority.consult` does.
    """
    entries, repaired = consult(client, open_authority(settings.ledger_url, settings.home), dataset)
    for line in repaired:
        tell(line)
    versions = {version.version: version for version in history(client, dataset)} if entries else {}
    verdicts = {entry.version: entry for entry in entries if entry.action in ("promoted", "rejected")}
    for number, entry in verdicts.items():
        if number in versions and (versions[number].verdict, versions[number].reason) != (entry.action, entry.why):
            _show(client, entry)
    return entries


def _show(client: MlflowClient, entry: Entry) -> None:
    """Puts the verdict on the version's page, and then beside it: an interruption is made up for the next time."""
    gates = [TypeAdapter(GateRow).validate_python(row) for row in entry.gates]
    page = as_markdown(gates, f"{entry.action} as generation {entry.generation}: {entry.why}")
    show_verdict(client, entry.dataset, entry.version, page)
    record_verdict(client, entry.dataset, entry.version, promoted=entry.action == "promoted", reason=entry.why)


def champion_of(client: MlflowClient, settings: Settings, dataset: str) -> Version | None:
    """The version that the ledger says is champion, None where there is none or it is not in the registry any more."""
    entries = decisions(client, settings, dataset)
    number = entries[-1].champion if entries else None
    return next((version for version in history(client, dataset) if version.version == number), None)

"""Back to a version that was champion before: no gates, but in the ledger, with a reason."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.decisions import decisions
from flows.settings import Settings
from tracking.authority import Entry, actor, open_authority
from tracking.packaging import download_verified
from tracking.registry import history
from tracking.runs import TRAINING

if TYPE_CHECKING:
    from mlflow import MlflowClient


class CannotRollBack(ValueError):
    """There is no version to go back to, or the one that was named was never champion."""


def roll_back(client: MlflowClient, settings: Settings, dataset: str, *, to: int | None, why: str) -> Entry:
    """Make the previous champion, or the version `to`, champion again; returns the decision.

    The one before it then becomes `previous`, so that a second rollback goes further back, and not forth again.

    Raises:
        CannotRollBack: see there.
        DigestMismatch: the version's files are not those that were registered.
        Overtaken: somebody else decided meanwhile.
        What `decisions` raises.
    """
    if not why.strip():
        raise CannotRollBack("--why is empty: say in a few words why, for those who read the ledger later")
    entries = decisions(client, settings, dataset)
    number = _target(dataset, entries, to)
    target = next((version for version in history(client, dataset) if version.version == number), None)
    if target is None:
        raise CannotRollBack(f"{dataset}: v{number} is not in the registry any more. Name another: --to VERSION")
    with tempfile.TemporaryDirectory(prefix="speck-model-") as folder:
        download_verified(client, dataset, number, Path(folder))
    newest = entries[-1]
    reigned = next((entry for entry in reversed(entries) if entry.champion == number), None)
    entry = Entry(
        dataset=dataset,
        generation=newest.generation + 1,
        at_ms=time.time_ns() // 1_000_000,
        who=actor(),
        action="rolled back",
        why=why.strip(),
        version=number,
        run_key=target.run_key,
        training=target.tags.get(TRAINING, target.run_key),
        champion=number,
        previous=reigned.previous if reigned else None,
        challenger=None if newest.challenger == number else newest.challenger,
        dataset_version=target.dataset_version,
        protocol=reigned.protocol if reigned else "",
        gates=(),
        # Nothing was measured: this is no look at the test split.
        looks_at_test=max((e.looks_at_test for e in entries if e.dataset_version == target.dataset_version), default=0),
    )
    open_authority(settings.ledger_url, settings.home).append(entry)
    decisions(client, settings, dataset, tell=lambda _: None)
    return entry


def _target(dataset: str, entries: Sequence[Entry], to: int | None) -> int:
    """The version to go back to. Raises CannotRollBack."""
    if not entries or entries[-1].champion is None:
        raise CannotRollBack(f"{dataset} has no champion yet, so there is nothing to go back from; `speck train-all`")
    present, previous = entries[-1].champion, entries[-1].previous
    former = {number for entry in entries for number in (entry.champion, entry.previous)} - {None, present}
    known = ", ".join(f"v{number}" for number in sorted(former, key=lambda number: number or 0)) or "none"
    if to is None and previous is None:
        raise CannotRollBack(f"{dataset}: no champion came before v{present}. Former champions for --to: {known}")
    target = previous if to is None else to
    if target == present:
        raise CannotRollBack(f"{dataset}: v{target} is the champion already. Former champions for --to: {known}")
    if target is None or target not in former:
        raise CannotRollBack(
            f"{dataset}: v{target} was never champion, and going back passes no gates: `speck promote` it instead. "
            f"Former champions for --to: {known}"
        )
    return target

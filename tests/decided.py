"""Decisions about models for tests, without the scores that they would come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient

from tracking.authority import Authority, Entry, settle
from tracking.registry import CHAMPION, Version, history


def entry(dataset: str, generation: int, version: int, **changes: Any) -> Entry:
    """A promotion of `version` by somebody; `champion` is the version unless told otherwise."""
    values = {
        "at_ms": 1_700_000_000_000 + generation, "who": "ada@lab", "action": "promoted", "why": "better",
        "run_key": f"run-{version}", "training": f"run-{version}", "champion": version, "previous": None,
        "challenger": None, "dataset_version": "0" * 32, "protocol": "coco",
        "gates": ({"gate": "superior", "threshold": "> 0.1", "champion": "0.1", "candidate": "0.2", "passed": True},),
        "looks_at_test": generation,
    }  # fmt: skip
    return Entry(dataset=dataset, generation=generation, version=version, **(values | changes))


def crown(client: MlflowClient, authority: Authority, dataset: str, version: int, run_key: str) -> Sequence[Entry]:
    """Promote a registered version, as a flow does after its gates; returns the ledger."""
    entries = authority.entries(dataset)
    before = entries[-1].champion if entries else None
    new = entry(dataset, len(entries) + 1, version, run_key=run_key, training=run_key, previous=before)
    authority.append(new)
    settle(client, [*entries, new], dataset)
    return [*entries, new]


def champion(client: MlflowClient, dataset: str) -> Version | None:
    """The version that has the alias `champion` in MLflow, None when there is none."""
    return next((version for version in history(client, dataset) if CHAMPION in version.aliases), None)

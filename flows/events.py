"""What happened, as events that Prefect's automations react to; see `flows.automations`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import runtime
from prefect.events import emit_event

if TYPE_CHECKING:
    from flows.promote import Promotion

DATASET_CHANGED = "speck.dataset.changed"
PROMOTED = "speck.model.promoted"
# Label of the resource: the flow that noticed, `None` where a command did.
FLOW = "speck.flow"


def dataset_changed(name: str, version: str, before: str) -> None:
    """A dataset has another version than before, which is empty where it had none."""
    _emit(DATASET_CHANGED, f"speck.dataset.{name}", {"name": name, "version": version, "before": before})


def promoted(promotion: Promotion) -> None:
    """A dataset has another champion; the event holds the verdict."""
    told = {
        "dataset": promotion.dataset, "run_key": promotion.run_key, "version": promotion.version,
        "reason": promotion.reason,
        "verdict": [] if promotion.verdict is None else [
            {"gate": row.gate, "candidate": row.candidate, "threshold": row.threshold, "passed": row.passed}
            for row in promotion.verdict.rows
        ],
    }  # fmt: skip
    _emit(PROMOTED, f"speck.model.{promotion.dataset}", told)


def _emit(event: str, resource: str, told: dict[str, Any]) -> None:
    run = runtime.flow_run
    related = [{"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.role": "flow-run"}]
    labels = {"prefect.resource.id": resource, "prefect.resource.name": resource, FLOW: str(run.flow_name)}
    emit_event(event, labels, related=related if run.id else None, payload=told)

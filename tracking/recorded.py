"""What MLflow keeps of a run, read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracking.client import speaks_to_store

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class RecordedRun:
    """A run's tags, latest metrics, and the values by step of the metrics that were asked for."""

    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    by_step: Mapping[str, Mapping[int, float]]


@speaks_to_store
def read_run(client: MlflowClient, run_id: str, by_step: Sequence[str] = ()) -> RecordedRun | None:
    """The run, with the history of the metrics `by_step`; None where it was deleted for good."""
    from mlflow.exceptions import MlflowException

    try:
        data = client.get_run(run_id).data
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    histories = {name: {m.step: m.value for m in client.get_metric_history(run_id, name)} for name in by_step}
    return RecordedRun(data.tags, data.metrics, histories)

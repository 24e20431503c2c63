"""One MLflow run for one tag, however many processes ask for it at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tracking.client import artifact_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

DUPLICATE_OF = "speck.duplicate_of"
# Opens in the UI's view for training rather than in the one for language-model traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def ensure_tagged(client: MlflowClient, experiment: str, tag: str, key: str, name: str, start_time_ms: int) -> Any:
    """The one run of an experiment whose tag is `key`, made or restored if need be; one that failed runs again."""
    if not re.fullmatch(r"[\w.-]+", key):
        raise ValueError(f"{tag} {key!r}: only letters, digits, '_', '.' and '-' can be searched for. Rename it")
    experiment_id = _experiment_id(client, experiment)
    if not (runs := find_tagged(client, experiment_id, tag, key)):
        client.create_run(experiment_id, start_time=start_time_ms, tags={tag: key}, run_name=name)
        runs = find_tagged(client, experiment_id, tag, key)
    run, *duplicates = runs
    for duplicate in duplicates:
        _put_away(client, duplicate, run.info.run_id)
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run.info.run_id)
    if run.info.status in ("FAILED", "KILLED"):
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def _put_away(client: MlflowClient, duplicate: Any, run_id: str) -> None:
    """Delete a run that was made beside another one of the same training, by two processes or for a lost answer.

    MLflow has nothing with which to make a run only once. Whoever finds several agrees on the first by id and deletes
    the others; a process that is at work on one of those is refused from then on, and looks for the run again.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.set_tag(duplicate.info.run_id, DUPLICATE_OF, run_id)
        client.delete_run(duplicate.info.run_id)
    except MlflowException:
        if client.get_run(duplicate.info.run_id).info.lifecycle_stage != "deleted":
            raise


def find_tagged(client: MlflowClient, experiment_id: str, tag: str, key: str) -> list[Any]:
    """Runs of this tag that are no known duplicates, the one that counts first; one that was deleted comes last."""
    from mlflow.entities import ViewType

    found = client.search_runs([experiment_id], f"tags.`{tag}` = '{key}'", run_view_type=ViewType.ALL)
    runs = [run for run in found if DUPLICATE_OF not in run.data.tags or run.info.lifecycle_stage == "active"]
    return sorted(
        runs,
        key=lambda run: (
            run.info.lifecycle_stage != "active",
            DUPLICATE_OF in run.data.tags,
            run.info.start_time,
            run.info.run_id,
        ),
    )


def _experiment_id(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        root = artifact_root(client.tracking_uri)
        location = (root / name).as_uri() if root else None
        try:
            return client.create_experiment(name, location, tags=EXPERIMENT_TAGS)  # type: ignore[no-any-return]
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id  # type: ignore[no-any-return]

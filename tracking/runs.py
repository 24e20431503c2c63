"""MLflow runs from the journal: every call may be repeated and leaves the same run behind."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from tracking.client import artifact_root, redacted, speaks_to_store
from tracking.names import metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PARENT_EXPERIMENT = "train-all"
# A store in SQLite lists metrics as they came, and MLflow's page of compared runs opens with the first.
FIRST_METRIC = "val/coco/AP"
RUN_KEY = "speck.run_key"
TRAINING = "speck.training"
SUPERSEDED_BY = "speck.superseded_by"
TRAIN_ALL = "speck.train_all"
NUM_NON_FINITE = "speck.num_non_finite"
# Opens in the UI's view for training rather than in the one for language-model traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_CHARACTERS = 6000
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class DatasetRef:
    """A dataset version: `version` is the DVC hash, `num_images` counts by split, `source` a path or URL."""

    name: str
    version: str
    source: str
    num_images: Mapping[str, int]


@dataclass(frozen=True)
class JournalEntry:
    """One report: `metrics` at `step`, with the time at which it was first written."""

    step: int
    epoch: float
    timestamp_ms: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Replayed:
    """Counts of metric values: sent now, there already, left out as not finite, left out as repeats of a step."""

    num_sent: int
    num_present: int
    num_non_finite: int
    num_repeated: int


@speaks_to_store
def ensure_parent(client: MlflowClient, *, train_all_id: str, name: str, start_time_ms: int) -> str:
    """The id of the run that stands for one `train-all` (its flow run's id), in the experiment `train-all`."""
    return _ensure(client, PARENT_EXPERIMENT, TRAIN_ALL, train_all_id, name, start_time_ms).info.run_id  # type: ignore[no-any-return]


@speaks_to_store
def close_parent(
    client: MlflowClient,
    run_id: str | None,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    *,
    documents: Mapping[str, str] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Ends the run of a `train-all` with its leaderboard: texts and tables by file name, and headline numbers.

    There is nothing to do where there is no such run.
    """
    from mlflow.entities import Metric

    if run_id is None:
        return
    for name, text in (documents or {}).items():
        client.log_text(run_id, text, name)
    for name, rows in (tables or {}).items():
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
        client.log_table(run_id, columns, name)
    now_ms = time.time_ns() // 1_000_000
    _send(client, run_id, [Metric(metric_name(key), value, now_ms, 0) for key, value in (metrics or {}).items()])
    client.set_terminated(run_id, status, end_time=now_ms)


@speaks_to_store
def ensure_run(
    client: MlflowClient,
    *,
    experiment: str,
    run_key: str,
    training_id: str,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    dataset: DatasetRef,
    start_time_ms: int,
    parent_run_id: str | None = None,
) -> str:
    """The id of the one run of `training_id`: found by its tag, restored if it was deleted, else created.

    Where a run key is trained again, by other code, that is another training; earlier ones are tagged as superseded.

    A parameter cannot change once logged: a different later value is kept in the tag `speck.changed.<name>`.
    Nor does a tag: who asks for a cached cell has not trained it.
    A cell may appear in many train-alls: each parent lists its cells in tags `speck.cell.<run key>`, and the
    cell's `mlflow.parentRunId` names the latest parent. A failed run goes back to RUNNING, a finished one does not.
    """
    from mlflow.entities import Param, RunTag

    run = _ensure(client, experiment, TRAINING, training_id, name, start_time_ms)
    run_id: str = run.info.run_id
    if training_id != run_key and RUN_KEY not in run.data.tags:
        for earlier in _find(client, run.info.experiment_id, RUN_KEY, run_key):
            client.set_tag(earlier.info.run_id, SUPERSEDED_BY, run_id)
    wanted = {key: _fitting(value) for key, value in params.items()}
    changed = {f"speck.changed.{key}": v for key, v in wanted.items() if run.data.params.get(key, v) != v}
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    missing = {key: value for key, value in {RUN_KEY: run_key, **tags, **changed}.items() if key not in run.data.tags}
    new_params = [Param(key, value) for key, value in wanted.items() if key not in run.data.params]
    new_tags = [RunTag(key, value) for key, value in {**missing, **parent}.items()]
    for start in range(0, max(len(new_params), len(new_tags)), PARAMS_PER_BATCH // 2):
        part = slice(start, start + PARAMS_PER_BATCH // 2)
        client.log_batch(run_id, params=new_params[part], tags=new_tags[part])
    _log_dataset(client, run, dataset)
    if parent_run_id:
        client.set_tag(parent_run_id, f"speck.cell.{run_key}", run_id)
    return run_id


@speaks_to_store
def replay(client: MlflowClient, run_id: str, entries: Iterable[JournalEntry]) -> Replayed:
    """Sends what is missing of `entries` with their own timestamps; a second replay changes nothing.

    What MLflow has of a metric at a step stays, whatever its value and time: the cell may have been trained again, or
    by two people. Of several values of one metric at one step (an epoch redone after a crash) the earliest counts.
    Names go through `metric_name`.
    """
    from mlflow.entities import Metric

    logged = client.get_run(run_id).data.metrics.keys()
    known: dict[str, set[int]] = {}
    seen: set[tuple[str, int]] = set()
    batch: list[Any] = []
    num_present = num_repeated = 0
    non_finite: list[str] = []
    for entry in sorted(entries, key=lambda entry: (entry.timestamp_ms, entry.step)):
        for key, value in entry.metrics.items():
            name = metric_name(key)
            if (name, entry.step) in seen:
                num_repeated += 1
                continue
            seen.add((name, entry.step))
            if not math.isfinite(value):
                non_finite.append(key)
                continue
            if name not in known:
                history = client.get_metric_history(run_id, name) if name in logged else []
                known[name] = {old.step for old in history}
            if entry.step in known[name]:
                num_present += 1
            else:
                batch.append(Metric(name, float(value), entry.timestamp_ms, entry.step))
    batch.sort(key=lambda metric: metric.key != FIRST_METRIC)
    _send(client, run_id, batch)
    if non_finite:
        _note_non_finite(client, run_id, non_finite)
    return Replayed(len(batch), num_present, len(non_finite), num_repeated)


@speaks_to_store
def finish(
    client: MlflowClient,
    run_id: str,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    *,
    scores: Mapping[str, float],
    artifacts_dir: Path | None,
    end_time_ms: int,
) -> None:
    """Logs new and changed `scores` at `end_time_ms`, uploads such files under `artifacts_dir`, sets the status.

    Raises ValueError for a score that is not finite, before anything is sent.
    """
    from mlflow.entities import Metric

    for key, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(f"score {key!r} is {value}: scores must be finite. Find out why before the run is closed")
    logged = client.get_run(run_id).data.metrics
    named = {metric_name(key): float(value) for key, value in scores.items()}
    _send(client, run_id, [Metric(key, v, end_time_ms, 0) for key, v in named.items() if logged.get(key) != v])
    if artifacts_dir is not None:
        upload(client, run_id, artifacts_dir)
    client.set_terminated(run_id, status, end_time=end_time_ms)


@speaks_to_store
def upload(client: MlflowClient, run_id: str, folder: Path, under: str = "") -> int:
    """Uploads every file of `folder` to the run's artifacts, below `under`; returns how many had to be sent.

    What was sent is known by its size there and its line in the run's artifact `SHA256SUMS`, which is written last.
    """
    present = dict(_artifact_sizes(client, run_id, under or None))
    sums = _read_sums(client, run_id)
    num_sent = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = PurePosixPath(under) / path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if (present.get(str(target)), sums.get(str(target))) != (path.stat().st_size, sha256):
            parent = str(target.parent)
            client.log_artifact(run_id, str(path), None if parent == "." else parent)
            sums[str(target)] = sha256
            num_sent += 1
    if num_sent:
        client.log_text(run_id, "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())), SUMS)
    return num_sent


def _read_sums(client: MlflowClient, run_id: str) -> dict[str, str]:
    """sha256 by path of the artifacts sent so far."""
    if SUMS not in (file.path for file in client.list_artifacts(run_id)):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(client.download_artifacts(run_id, SUMS, folder)).read_text(encoding="utf-8").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _artifact_sizes(client: MlflowClient, run_id: str, path: str | None) -> Iterator[tuple[str, int]]:
    for file in client.list_artifacts(run_id, path):
        if file.is_dir:
            yield from _artifact_sizes(client, run_id, file.path)
        else:
            yield file.path, file.file_size


def _send(client: MlflowClient, run_id: str, metrics: list[Any]) -> None:
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def _note_non_finite(client: MlflowClient, run_id: str, names: list[str]) -> None:
    count = str(len(names))
    if client.get_run(run_id).data.tags.get(NUM_NON_FINITE) != count:
        log.warning(
            "%s metric values are not finite and not logged to MLflow: %s", count, ", ".join(sorted(set(names)))
        )
        client.set_tag(run_id, NUM_NON_FINITE, count)


def _ensure(client: MlflowClient, experiment: str, tag: str, key: str, name: str, start_time_ms: int) -> Any:
    if not re.fullmatch(r"[\w.-]+", key):
        raise ValueError(f"{tag} {key!r}: only letters, digits, '_', '.' and '-' can be searched for. Rename it")
    experiment_id = _experiment_id(client, experiment)
    if not (runs := _find(client, experiment_id, tag, key)):
        client.create_run(experiment_id, start_time=start_time_ms, tags={tag: key}, run_name=name)
        runs = _find(client, experiment_id, tag, key)
    # A create whose answer got lost is retried by the HTTP layer and may leave two runs: the first one stays.
    run, *duplicates = runs
    for duplicate in duplicates:
        client.set_tag(duplicate.info.run_id, "speck.duplicate_of", run.info.run_id)
        client.delete_tag(duplicate.info.run_id, tag)
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run.info.run_id)
    if run.info.status in ("FAILED", "KILLED"):
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def _find(client: MlflowClient, experiment_id: str, tag: str, key: str) -> list[Any]:
    from mlflow.entities import ViewType

    runs = client.search_runs([experiment_id], f"tags.`{tag}` = '{key}'", run_view_type=ViewType.ALL)
    return sorted(runs, key=lambda run: (run.info.lifecycle_stage != "active", run.info.start_time, run.info.run_id))


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


def _log_dataset(client: MlflowClient, run: Any, dataset: DatasetRef) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    # MLflow keeps one input per (name, digest), and with it one context: hence a name per split.
    names = {f"{dataset.name}/{split}": split for split in dataset.num_images}
    present = {(old.dataset.name, old.dataset.digest) for old in run.inputs.dataset_inputs}
    source = json.dumps({"uri": redacted(dataset.source)})
    inputs = [
        DatasetInput(
            Dataset(
                name, dataset.version, "dvc", source, profile=json.dumps({"num_images": dataset.num_images[split]})
            ),
            [InputTag("mlflow.data.context", split)],
        )
        for name, split in names.items()
        if (name, dataset.version) not in present
    ]
    if not inputs:
        return
    try:
        client.log_inputs(run.info.run_id, datasets=inputs)
    except MlflowException:
        # Of two cells that begin together, MLflow refuses one: both found the dataset missing and wrote it.
        client.log_inputs(run.info.run_id, datasets=inputs)


def _fitting(value: str) -> str:
    if len(value) <= PARAM_CHARACTERS:
        return value
    note = f"... (cut: {len(value)} characters, whole in spec.json)"
    return value[: PARAM_CHARACTERS - len(note)] + note

"""MLflow runs from the journal: every call may be repeated and leaves the same run behind."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tracking.client import PART_BYTES, redacted, speaks_to_store
from tracking.names import metric_name
from tracking.tagged import ensure_tagged, find_tagged

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
PROCESS = "speck.process"
NUM_NON_FINITE = "speck.num_non_finite"
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_CHARACTERS = 6000
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class DatasetRef:
    """A dataset version: `version` is the DVC hash, `num_images` counts by split, `source` a path or URL.

    Where nobody knows the counts of that version any more, the dataset is told as a whole.
    """

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


class Sent(NamedTuple):
    """Counts of what MLflow lacked."""

    num_metrics: int
    num_files: int


class FoundRun(NamedTuple):
    """A run of MLflow, and whether somebody deleted it."""

    run_id: str
    is_deleted: bool


@speaks_to_store
def ensure_parent(
    client: MlflowClient, *, train_all_id: str, name: str, start_time_ms: int, process: Mapping[str, object]
) -> str:
    """The id of the run that stands for one `train-all` (its flow run's id), in the experiment `train-all`."""
    run_id: str = ensure_tagged(client, PARENT_EXPERIMENT, TRAIN_ALL, train_all_id, name, start_time_ms).info.run_id
    client.set_tag(run_id, PROCESS, json.dumps(process))
    return run_id


@speaks_to_store
def end_abandoned(client: MlflowClient, is_dead: Callable[[Mapping[str, Any]], bool]) -> list[str]:
    """Mark runs of `train-all` as killed that say to be running though their process is gone; returns their names."""
    if (experiment := client.get_experiment_by_name(PARENT_EXPERIMENT)) is None:
        return []
    running = f"attributes.status = 'RUNNING' and tags.`{PROCESS}` != ''"
    found = client.search_runs([experiment.experiment_id], running)
    gone = [run for run in found if is_dead(json.loads(run.data.tags[PROCESS]))]
    for run in gone:
        client.set_terminated(run.info.run_id, "KILLED")
    return [run.info.run_name for run in gone]


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

    run = ensure_tagged(client, experiment, TRAINING, training_id, name, start_time_ms)
    run_id: str = run.info.run_id
    if training_id != run_key and RUN_KEY not in run.data.tags:
        for earlier in find_tagged(client, run.info.experiment_id, RUN_KEY, run_key):
            # One that somebody deleted takes no tag.
            if earlier.info.lifecycle_stage == "active" and earlier.data.tags.get(TRAINING) != training_id:
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


@dataclass(frozen=True)
class Recorded:
    """What MLflow has of a training; `values` are all that were ever logged of the metric that was asked for."""

    run_id: str
    status: str
    tags: Mapping[str, str]
    values: tuple[float, ...]


@speaks_to_store
def find_training(client: MlflowClient, experiment: str, training_id: str, metric: str) -> Recorded | None:
    """The run of a training, None where there is none, or it was deleted."""
    runs = _of_training(client, experiment, training_id)
    if not runs or runs[0].info.lifecycle_stage != "active":
        return None
    info, data, name = runs[0].info, runs[0].data, metric_name(metric)
    # Earlier releases logged a changed score at the same time as the first, and MLflow calls the higher the latest.
    logged = client.get_metric_history(info.run_id, name) if name in data.metrics else []
    return Recorded(info.run_id, info.status, data.tags, tuple(value.value for value in logged))


@speaks_to_store
def replay(client: MlflowClient, run_id: str, entries: Iterable[JournalEntry]) -> Replayed:
    """Sends what is missing of `entries` with their own timestamps; a second replay changes nothing.

    What MLflow has of a metric at a step stays, whatever its value and time: the cell may have been trained again, or
    by two people. Of several values of one metric at one step (an epoch redone after a crash) the earliest counts.
    Names go through `metric_name`.
    """
    from mlflow.entities import Metric

    # Of each metric the entry of the highest step: past that one there is nothing, and no history need be asked for.
    latest = {metric.key: metric.step for metric in client.get_run(run_id).data._metric_objs}
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
            if entry.step <= latest.get(name, -1) and name not in known:
                known[name] = {old.step for old in client.get_metric_history(run_id, name)}
            if entry.step in known.get(name, ()):
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
) -> Sent:
    """Logs new and changed `scores` at `end_time_ms`, uploads such files under `artifacts_dir`, sets the status.

    A score that changed has a later time than the one before it, for of two at once MLflow shows the higher.

    Raises ValueError for a score that is not finite, before anything is sent.
    """
    from mlflow.entities import Metric

    for key, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(f"score {key!r} is {value}: scores must be finite. Find out why before the run is closed")
    logged = {metric.key: metric for metric in client.get_run(run_id).data._metric_objs}
    named = {metric_name(key): float(value) for key, value in scores.items()}
    new = [
        Metric(key, value, end_time_ms if old is None else max(end_time_ms, old.timestamp + 1), 0)
        for key, value in named.items()
        if (old := logged.get(key)) is None or old.value != value
    ]
    _send(client, run_id, new)
    num_files = 0 if artifacts_dir is None else upload(client, run_id, artifacts_dir)
    client.set_terminated(run_id, status, end_time=end_time_ms)
    return Sent(len(new), num_files)


@speaks_to_store
def annotate(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags that are to say what is the case now."""
    from mlflow.entities import RunTag

    known = client.get_run(run_id).data.tags
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items() if known.get(key) != value])


@speaks_to_store
def find_run(client: MlflowClient, experiment: str, training_id: str) -> FoundRun | None:
    """A training's run, None where there is none yet."""
    runs = _of_training(client, experiment, training_id)
    return FoundRun(runs[0].info.run_id, runs[0].info.lifecycle_stage == "deleted") if runs else None


def _of_training(client: MlflowClient, experiment: str, training_id: str) -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else find_tagged(client, found.experiment_id, TRAINING, training_id)


@speaks_to_store
def upload(client: MlflowClient, run_id: str, folder: Path, under: str = "") -> int:
    """Uploads every file of `folder` to the run's artifacts, below `under`; returns how many had to be sent.

    What was sent is known by its size there and its line in the run's artifact `SHA256SUMS`, which is written after it:
    what an interruption cut short is sent again.
    """
    present = dict(_artifact_sizes(client, run_id, under or None))
    sums = artifact_sums(client, run_id)
    num_sent = num_unlisted = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target, size_bytes = PurePosixPath(under) / path.relative_to(folder).as_posix(), path.stat().st_size
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if (present.get(str(target)), sums.get(str(target))) == (size_bytes, sha256):
            continue
        parent = str(target.parent)
        client.log_artifact(run_id, str(path), None if parent == "." else parent)
        sums[str(target)] = sha256
        num_sent, num_unlisted = num_sent + 1, num_unlisted + 1
        if size_bytes >= PART_BYTES:
            # An interruption later on costs none of it.
            _write_sums(client, run_id, sums)
            num_unlisted = 0
    if num_unlisted:
        _write_sums(client, run_id, sums)
    return num_sent


def _write_sums(client: MlflowClient, run_id: str, sums: Mapping[str, str]) -> None:
    client.log_text(run_id, "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())), SUMS)


@speaks_to_store
def artifact_sums(client: MlflowClient, run_id: str) -> dict[str, str]:
    """sha256 by path of the artifacts that were sent to a run so far."""
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


def _log_dataset(client: MlflowClient, run: Any, dataset: DatasetRef) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    # MLflow keeps one input per (name, digest), and with it one context: hence a name per split.
    profiles = {(f"{dataset.name}/{split}", split): {"num_images": n} for split, n in dataset.num_images.items()}
    profiles = profiles or {(dataset.name, "train"): {}}
    present = {(old.dataset.name, old.dataset.digest) for old in run.inputs.dataset_inputs}
    source = json.dumps({"uri": redacted(dataset.source)})
    inputs = [
        DatasetInput(
            Dataset(name, dataset.version, "dvc", source, profile=json.dumps(profile)),
            [InputTag("mlflow.data.context", split)],
        )
        for (name, split), profile in profiles.items()
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

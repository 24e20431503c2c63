"""Eight processes bring MLflow up to date at once, the same run and others: nothing is lost, nothing is there twice."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from recorded import history, leave_run
from services.mlflow_server import mlflow_service
from services.postgres_server import postgres_missing, postgres_service
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service

from flows.sync import sync
from tracking.client import connect
from training.spec import RunSpec

NUM_PROCESSES = 8
NUM_EPOCHS = 20
METRICS = (*(f"train/metric_{n}" for n in range(20)), "val/coco/AP", "system/cpu_percent", "system/node_1/cpu_percent")
ARTIFACTS = {"weights.safetensors": os.urandom(2**20), "report.html": b"<html>"}
STORES = ("SQLite", "a server on SQLite, artifacts on S3", "a server on PostgreSQL, artifacts on S3")


@pytest.fixture(params=[STORES[0], *(pytest.param(store, marks=pytest.mark.soak) for store in STORES[1:])])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a new tracking store."""
    if request.param == STORES[0]:
        yield f"sqlite:///{tmp_path / 'mlflow.db'}"
        return
    if RCLONE is None:
        pytest.skip(WITHOUT_RCLONE)
    (tmp_path / "served/bucket").mkdir(parents=True)
    with s3_service(tmp_path / "served") as s3, pytest.MonkeyPatch.context() as for_server:
        for name, value in s3.environment.items():
            for_server.setenv(name, value)
        if request.param == STORES[1]:
            yield from served(tmp_path, monkeypatch, None)
            return
        if (why := postgres_missing()) is not None:
            pytest.skip(why)
        with postgres_service() as database:
            yield from served(tmp_path, monkeypatch, database)


def served(folder: Path, monkeypatch: pytest.MonkeyPatch, database: str | None) -> Iterator[str]:
    (folder / "mlflow").mkdir()
    with mlflow_service(folder / "mlflow", database=database, artifacts="s3://bucket/mlflow") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield service.url


def replay(uri: str, folders: list[Path], together: Barrier, failures: Any) -> None:
    client = connect(uri)
    together.wait(120)
    for one in sync(client, folders, restores=False):
        if one.problem is not None:
            failures.put(f"{one.training}: {one.problem}")


def test_nothing_is_lost_and_nothing_is_there_twice(
    uri: str, tmp_path: Path, tiny_spec: Callable[..., RunSpec]
) -> None:
    folders = [
        leave_run(tmp_path / "runs" / spec.run_key, spec, metrics=METRICS, num_epochs=NUM_EPOCHS, artifacts=ARTIFACTS)
        for spec in (tiny_spec(seed=seed) for seed in range(NUM_PROCESSES + 1))
    ]
    context = multiprocessing.get_context("fork")
    together, failures = context.Barrier(NUM_PROCESSES), context.Queue()
    processes = [
        context.Process(target=replay, args=(uri, [folders[0], own], together, failures)) for own in folders[1:]
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0] * NUM_PROCESSES

    client = connect(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny-squares").experiment_id])
    assert sorted(run.data.tags["speck.run_key"] for run in runs) == sorted(folder.name for folder in folders)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in ARTIFACTS.items()}
    for run in runs:
        assert run.info.status == "FINISHED"
        for name in METRICS:
            found = sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name))
            assert found == history(NUM_EPOCHS)
        (tmp_path / run.info.run_id).mkdir()
        files = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path / run.info.run_id)))
        for name, sha256 in sums.items():
            assert hashlib.sha256((files / name).read_bytes()).hexdigest() == sha256
    again = [*sync(client, folders, restores=False)]
    assert [(one.is_new, one.num_metrics, one.problem) for one in again] == [(False, 0, None)] * len(folders)

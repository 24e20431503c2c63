"""Runs, registry and promotion against a real MLflow server that demands credentials."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from decided import champion
from services.mlflow_server import MlflowService, mlflow_service

from tracking.client import TrackingUnavailable, connect
from tracking.packaging import digest
from tracking.registry import CHAMPION, history, move_alias, register
from tracking.runs import DatasetRef, JournalEntry, ensure_parent, ensure_run, finish, replay, upload

DATASET = DatasetRef("dots", "0123456789abcdef0123456789abcdef.dir", "/srv/dots", {"train": 7, "val": 2, "test": 3})
ENTRIES = [
    JournalEntry(step, step / 4, 1_700_000_000_000 + 1_000 * step, {"train/loss": 1 / (step + 1), "system/cpu": 50.0})
    for step in range(700)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowService]:
    with mlflow_service(tmp_path_factory.mktemp("mlflow")) as service:
        yield service


@pytest.fixture
def client(server: MlflowService, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return connect(server.url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files" / "plots").mkdir(parents=True)
    (tmp_path / "files" / "spec.json").write_text("{}")
    (tmp_path / "files" / "plots" / "curve.txt").write_text("0 1 2")
    return tmp_path / "files"


def start(client: Any, run_key: str, **more: Any) -> str:
    return ensure_run(
        client,
        experiment="dots",
        run_key=run_key,
        training_id=run_key,
        name="yolox-nano",
        params={"training.learning_rate": "0.01"},
        tags={"mlflow.source.git.commit": "f" * 40},
        dataset=DATASET,
        start_time_ms=1_700_000_000_000,
        **more,
    )


def test_a_cell_logged_three_times_is_there_once(client: Any, folder: Path) -> None:
    for _ in range(3):
        parent = ensure_parent(
            client, train_all_id="flow-run-1", name="train-all", start_time_ms=1_700_000_000_000, process={}
        )
        run_id = start(client, "0123456789ab", parent_run_id=parent)
        replay(client, run_id, ENTRIES)
        finish(
            client,
            run_id,
            "FINISHED",
            scores={"test/coco/AP": 0.25},
            artifacts_dir=folder,
            end_time_ms=1_700_001_000_000,
        )
    experiment_id = client.get_experiment_by_name("dots").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment_id])] == [run_id]
    for key in ("train/loss", "system/cpu"):
        found = sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key))
        assert found == [(entry.step, entry.timestamp_ms, entry.metrics[key]) for entry in ENTRIES]
    assert [m.value for m in client.get_metric_history(run_id, "test/coco/AP")] == [0.25]
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 1_700_001_000_000)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert {i.dataset.digest for i in run.inputs.dataset_inputs} == {DATASET.version}
    assert upload(client, run_id, folder) == 0
    assert Path(client.download_artifacts(run_id, "plots/curve.txt")).read_text() == "0 1 2"


def test_versions_are_registered_once_and_the_alias_moves(client: Any, folder: Path) -> None:
    versions = {}
    for run_key, score in (("aaaaaaaaaaaa", 0.25), ("bbbbbbbbbbbb", 0.5), ("bbbbbbbbbbbb", 0.5)):
        versions[run_key] = register(
            client,
            model_name="dots",
            run_id=start(client, run_key),
            run_key=run_key,
            model_folder=folder,
            tags={"speck.architecture": "yolox-nano"},
            scores={"coco/AP": score},
        )
        move_alias(client, "dots", CHAMPION, versions[run_key])
    entries = history(client, "dots")
    assert [(v.run_key, v.scores, v.aliases) for v in entries] == [
        ("bbbbbbbbbbbb", {"coco/AP": 0.5}, ("champion",)),
        ("aaaaaaaaaaaa", {"coco/AP": 0.25}, ()),
    ]
    assert champion(client, "dots") == entries[0]
    assert entries[0].digest == digest(folder)


@pytest.mark.parametrize("password", [None, "not the password"])
def test_the_server_demands_credentials(
    server: MlflowService, monkeypatch: pytest.MonkeyPatch, password: str | None
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    if password:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", server.environment["MLFLOW_TRACKING_USERNAME"])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(TrackingUnavailable, match="401"):
        connect(server.url)


@pytest.mark.parametrize(
    "path", ["/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/api/2.0/mlflow-artifacts/artifacts", "/graphql"]
)
def test_no_page_is_served_to_strangers(server: MlflowService, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(server.url + path, timeout=300)
    assert caught.value.code == 401


def test_a_server_that_dies_is_reported_in_bounded_time_and_the_replay_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_service(tmp_path / "home") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        client = connect(service.url)
        run_id = start(client, "0123456789ab")
        replay(client, run_id, ENTRIES[:300])
    with pytest.raises(TrackingUnavailable, match="`speck sync` sends it"):
        replay(client, run_id, ENTRIES)
    with mlflow_service(tmp_path / "home", port=int(service.url.rpartition(":")[2])):
        assert start(client, "0123456789ab") == run_id
        replay(client, run_id, ENTRIES)
        assert sorted(m.step for m in client.get_metric_history(run_id, "train/loss")) == list(range(700))

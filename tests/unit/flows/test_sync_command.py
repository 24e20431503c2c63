"""`speck sync`: a tracking store that was never there while runs trained has all of them afterwards, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import history, leave_run
from typer.testing import CliRunner
from unit.training.storage import KINDS, Storage, storage_of

from flows.cli import app, is_expected
from flows.evaluate import UnknownRun
from flows.settings import Settings
from tracking.client import TrackingUnavailable, connect
from training.records import supersede
from training.spec import RunSpec

METRICS = ("train/loss", "val/coco/AP", "system/cpu_percent")
Train = Callable[..., Path]


@pytest.fixture
def train(settings: Settings) -> Train:
    """See `leave_run`; in the settings' storage unless a folder is given."""

    def make(spec: RunSpec, ending: str | None = "finished", folder: Path | None = None) -> Path:
        return leave_run(folder or settings.storage / spec.run_key, spec, metrics=METRICS, ending=ending)

    return make


def speck(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sync", *arguments])


def synced(*arguments: str) -> list[dict[str, Any]]:
    answer = speck(*arguments, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def test_runs_that_mlflow_never_heard_of_are_there_once_and_whole(
    settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    specs = [cell_spec(seed=seed) for seed in range(3)]
    for spec, ending in zip(specs, ("finished", "no memory", None), strict=True):
        train(spec, ending)
    first = speck()
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert len(lines) == 3
    (line,) = [line for line in lines if line.startswith(specs[0].run_key)]
    # The journal's, eight scores and four of the ledger; the weights, attempts and ledger.
    assert line.endswith(f"{specs[0].title}: made, {3 * len(METRICS) + 12} metric values and 3 files sent")
    again = synced()
    assert [(one["num_metrics"], one["num_files"], one["is_new"]) for one in again] == [(0, 0, False)] * 3
    assert "nothing was lacking" in speck().stdout
    client = connect(settings.tracking_uri)
    runs = {
        run.data.tags["speck.run_key"]: run
        for run in client.search_runs([client.get_experiment_by_name("tiny-squares").experiment_id])
    }
    assert [runs[spec.run_key].info.status for spec in specs] == ["FINISHED", "FAILED", "RUNNING"]
    for spec in specs:
        run = runs[spec.run_key]
        for name in METRICS:
            found = sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name))
            assert found == history()
        assert run.data.tags["speck.host"] == "here"
    finished = runs[specs[0].run_key]
    assert finished.data.metrics["final/test/coco/AP"] == 0.5
    weights = client.download_artifacts(finished.info.run_id, "weights.safetensors")
    assert Path(weights).read_bytes() == b"weights"
    assert runs[specs[1].run_key].data.tags["speck.ending"] == "failed: no memory"


def test_one_run_may_be_named_and_only_that_one_is_sent(
    settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    specs = [cell_spec(seed=seed) for seed in range(2)]
    for spec in specs:
        train(spec)
    assert [one["training"] for one in synced(specs[1].run_key[:8])] == [specs[1].run_key]
    for asked in ("nothing", ""):
        error = speck(asked).exception
        assert isinstance(error, UnknownRun)
        assert is_expected(error)
        assert specs[0].run_key in str(error)


def test_what_somebody_deleted_in_mlflow_stays_deleted_unless_it_is_named(
    settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    spec = cell_spec()
    train(spec)
    (one,) = synced()
    client = connect(settings.tracking_uri)
    client.delete_run(one["run_id"])
    (told,) = synced()
    assert told["problem"] == f"deleted in MLflow, and left so; `speck sync {spec.run_key}` brings it back"
    assert client.get_run(one["run_id"]).info.lifecycle_stage == "deleted"
    (told,) = synced(spec.run_key)
    assert (told["run_id"], told["problem"]) == (one["run_id"], None)
    assert client.get_run(one["run_id"]).info.lifecycle_stage == "active"


def test_an_earlier_training_of_a_run_points_to_the_later_one(
    settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    spec = cell_spec()
    supersede(train(spec))
    train(spec)
    earlier, later = synced()
    assert (earlier["training"], later["training"]) == (spec.run_key, f"{spec.run_key}.2")
    client = connect(settings.tracking_uri)
    assert client.get_run(earlier["run_id"]).data.tags["speck.superseded_by"] == later["run_id"]
    assert "speck.superseded_by" not in client.get_run(later["run_id"]).data.tags
    assert [(one["num_metrics"], one["num_files"]) for one in synced()] == [(0, 0)] * 2


def test_a_damaged_run_is_told_and_costs_the_others_nothing(
    settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    sound, damaged = cell_spec(seed=0), cell_spec(seed=1)
    train(sound)
    (train(damaged) / "attempts" / "001.json").write_text("{")
    answer = speck()
    assert answer.exit_code == 1
    assert f"{sound.run_key}   {sound.title}: made, " in answer.stdout
    assert f"{damaged.run_key}   : not sent: ValidationError" in answer.stdout


def test_a_store_that_is_still_away_is_told(
    settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    assert "there is no run in" in speck().stdout
    train(cell_spec())
    shutil.rmtree(settings.home / "mlartifacts", ignore_errors=True)
    (settings.home / "mlflow.db").write_text("no database")
    error = speck().exception
    assert isinstance(error, TrackingUnavailable)
    assert is_expected(error)


@pytest.fixture(params=KINDS)
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> Iterator[Storage]:
    with storage_of(request.param, settings.home, monkeypatch) as made:
        if request.param == "s3":
            monkeypatch.setenv("SPECK_STORAGE", made.url)
        yield made


def test_records_that_only_the_storage_has_are_sent_from_there(
    storage: Storage, settings: Settings, train: Train, cell_spec: Callable[..., RunSpec]
) -> None:
    finished, retrained = cell_spec(seed=0), cell_spec(seed=1)
    train(finished, folder=storage.files / finished.run_key)
    aside = supersede(train(retrained, folder=storage.files / retrained.run_key))
    train(retrained, folder=storage.files / retrained.run_key)
    if storage.port:
        # Beside the runs in a folder, below them on S3.
        shutil.move(aside.parent, storage.files / "superseded" / retrained.run_key)
    sent = synced()
    expected = [finished.run_key, retrained.run_key, f"{retrained.run_key}.2"]
    assert sorted(one["training"] for one in sent) == sorted(expected)
    assert all(one["is_new"] and one["num_files"] for one in sent)
    assert [(one["num_metrics"], one["num_files"]) for one in synced()] == [(0, 0)] * 3

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

import flows.record
from flows.record import ATTEMPTS_FILE, LEDGER_FILE, Recorder, flat_params, flat_scores
from tracking.client import connect
from training.ledger import UsageLog, read_ledger
from training.machines import in_words, this_node
from training.records import (
    Attempt,
    Ending,
    JournalEntry,
    RunResult,
    record_attempt,
    training_id,
    write_ending,
    write_entry,
)
from training.spec import RunSpec
from training.store import FolderStore

FAILED = Ending(status="FAILED", cause="no memory", ended_ms=9_000)


def dead_server() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "no database"])
def test_a_store_that_is_not_there_costs_one_warning(
    kind: str,
    tmp_path: Path,
    cell_spec: Callable[..., RunSpec],
    make_result: Callable[..., RunResult],
    monkeypatch: pytest.MonkeyPatch,
    environment: None,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mlflow.db").write_text("no database")
    uri = dead_server() if kind == "refused" else f"sqlite:///{tmp_path / 'mlflow.db'}"
    spec, warnings = cell_spec(), list[str]()
    write_entry(
        tmp_path,
        JournalEntry(run_key=spec.run_key, attempt=1, step=6, epoch=1, timestamp_ms=1, seconds=1, code_hash="c",
                     metrics={"train/loss": 1.0}),
    )  # fmt: skip
    recorder = Recorder(uri, None, warnings.append)
    attempt = Attempt(run_key=spec.run_key, number=1, spec=spec, data_source="", code_hash="c", submitted_ms=1)
    recorder.begin(attempt, tmp_path)
    recorder.sync(tmp_path)
    recorder.finish(tmp_path, make_result(spec, 0.25, 0.5))
    recorder.end(tmp_path, FAILED)
    assert recorder.run_id is None
    assert len(warnings) == 1
    assert uri in warnings[0]


def test_a_store_that_comes_back_before_the_end_of_a_cell_gets_all_of_it(
    tmp_path: Path, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult], environment: None
) -> None:
    database, spec, warnings = tmp_path / "mlflow.db", cell_spec(), list[str]()
    database.write_text("no database")
    recorder = Recorder(f"sqlite:///{database}", None, warnings.append)
    attempt = Attempt(run_key=spec.run_key, number=1, spec=spec, data_source="", code_hash="c", submitted_ms=1)
    recorder.begin(attempt, tmp_path)
    assert len(warnings) == 1
    database.unlink()
    recorder.begin(attempt, tmp_path)
    recorder.finish(tmp_path, make_result(spec, 0.25, 0.5))
    assert recorder.run_id is not None
    run = connect(f"sqlite:///{database}").get_run(recorder.run_id)
    assert (run.info.status, run.data.metrics["final/test/coco/AP"]) == ("FINISHED", 0.5)
    assert len(warnings) == 1


@pytest.mark.parametrize("is_finished", [True, False])
def test_what_the_attempts_held_is_in_their_run_whether_they_succeeded_or_not(
    is_finished: bool,
    tmp_path: Path,
    cell_spec: Callable[..., RunSpec],
    make_result: Callable[..., RunResult],
    environment: None,
) -> None:
    spec, database = cell_spec(), f"sqlite:///{tmp_path / 'mlflow.db'}"
    spec = spec.model_copy(update={"compute": spec.compute.model_copy(update={"price_per_hour": 3600.0})})
    attempt = record_attempt(tmp_path / "run", spec, data_source="", code_hash="c")
    (tmp_path / "run" / "artifacts").mkdir(parents=True)
    UsageLog(FolderStore(tmp_path / "run"), attempt, 2, print).close()
    recorder = Recorder(database, None, print)
    recorder.begin(attempt, tmp_path / "run")
    if is_finished:
        recorder.finish(tmp_path / "run", make_result(spec, 0.25, 0.5))
    else:
        recorder.end(tmp_path / "run", FAILED)
    assert recorder.run_id is not None
    client, ledger = connect(database), read_ledger(tmp_path / "run")
    assert ledger is not None
    metrics = client.get_run(recorder.run_id).data.metrics
    assert {name: value for name, value in metrics.items() if name.startswith("ledger/")} == {
        "ledger/held_cpu_h": ledger.total.held_s / 3600,
        "ledger/wasted_cpu_h": ledger.total.held_s / 3600,
        "ledger/useful_share": 0.0,
        "ledger/starts": 1.0,
        "ledger/price": pytest.approx(ledger.total.held_s),
    }
    kept = client.download_artifacts(recorder.run_id, LEDGER_FILE, str(tmp_path))
    assert json.loads(Path(kept).read_bytes()) == ledger.as_json()


def test_params_are_the_whole_spec_but_the_card_under_dotted_names(cell_spec: Callable[..., RunSpec]) -> None:
    spec = cell_spec(seed=3)
    params = flat_params(spec)
    assert params["training.learning_rate"] == str(spec.training.learning_rate)
    assert params["training.augment.flip_probability"] == str(spec.training.augment.flip_probability)
    assert params["settings.width"] == str(spec.architecture.settings["width"])
    assert (params["architecture"], params["dataset"]) == (spec.architecture.name, spec.dataset.name)
    assert (params["dataset_version"], params["seed"]) == (spec.dataset.version, "3")
    assert [name for name in params if "card" in name] == []

    content = spec.model_dump(mode="json")
    content |= {"settings": spec.architecture.settings, "architecture": spec.architecture.name}
    content |= {"dataset": spec.dataset.name, "dataset_version": spec.dataset.version}
    for name, value in params.items():
        place = content
        for part in name.split("."):
            place = place[part]
        assert value == str(place)
    assert flat_params(cell_spec(seed=4)).keys() == params.keys()


def test_what_differs_between_cells_begins_with_the_axes_of_the_matrix(
    cell_spec: Callable[..., RunSpec],
) -> None:
    """MLflow's parallel coordinates open with the first three parameters, by name, that differ."""
    one, other = (flat_params(cell_spec(*axes)) for axes in (("yolox-nano", "apples"), ("yolox-s", "pears")))
    assert sorted(name for name in one if one[name] != other[name])[:2] == ["architecture", "dataset"]


def test_scores_name_split_protocol_and_class_and_leave_out_what_had_no_ground_truth(
    cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    assert flat_scores(make_result(cell_spec(), 0.25, None)) == {
        "final/val/coco/AP": 0.25,
        "final/val/coco/AP50": 0.625,
        "final/val/coco/AP/bright": 0.25,
        "final/val/coco/AR/bright": 0.75,
        "final/test/coco/AR/bright": 0.75,
    }


def report(step: int) -> JournalEntry:
    return JournalEntry(
        run_key="a" * 12, attempt=1, step=step, epoch=step, timestamp_ms=1_000 + step, seconds=1, code_hash="c",
        metrics={"train/loss": 1 / step, "system/node_1/cpu_percent": 50.0},
    )  # fmt: skip


def test_every_attempt_is_told_with_what_it_resumed_from_and_how_it_ended(
    tmp_path: Path, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult], environment: None
) -> None:
    spec, folder, database = cell_spec(), tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    (folder / "artifacts").mkdir(parents=True)
    recorder = Recorder(database, None, pytest.fail)
    for number, step in ((1, 0), (2, 6)):
        attempt = record_attempt(folder, spec, data_source="s3://data/secret-place", code_hash="c")
        recorder.begin(attempt, folder)
        usage = UsageLog(FolderStore(folder), attempt, 2, print)
        usage.runs_on([this_node()])
        usage.resumed(step, 0.0)
        usage.close()
        for name, text in (("environment.txt", "torch==2"), ("dirty.diff", "+1"), ("dvc.lock", "stages: {}")):
            FolderStore(folder).write(f"attempts/{number:03d}/{name}", text.encode())
        if number == 1:
            write_ending(folder, 1, FAILED)
            recorder.end(folder, FAILED)
            client, run_id = connect(database), str(recorder.run_id)
            run = client.get_run(run_id)
            assert (run.info.status, run.info.end_time) == ("FAILED", 9_000)
            assert run.data.tags["speck.ending"] == "failed: no memory"
            assert "speck.resumed_from" not in run.data.tags
    recorder.finish(folder, make_result(spec, 0.25, 0.5, attempts=2))
    assert recorder.run_id == run_id
    tags = client.get_run(run_id).data.tags
    assert (tags["speck.attempts"], tags["speck.ending"]) == ("2", "finished")
    assert tags["speck.resumed_from"] == "step 6 in attempt 2"
    assert tags["speck.machines"] == in_words([this_node()])
    files = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    attempts = json.loads((files / ATTEMPTS_FILE).read_text())
    assert [one["ending"] for one in attempts] == ["failed: no memory", "finished"]
    assert [one["starts"][0]["resumed_step"] for one in attempts] == [0, 6]
    assert attempts[1]["starts"][0]["nodes"] == [this_node().model_dump(mode="json")]
    for number in (1, 2):
        assert (files / f"attempts/{number:03d}/environment.txt").read_text() == "torch==2"
        assert (files / f"attempts/{number:03d}/dirty.diff").read_text() == "+1"
    assert "secret-place" not in (files / ATTEMPTS_FILE).read_text()


def test_a_store_that_is_away_in_the_middle_gets_the_epochs_of_that_time_when_it_is_back(
    tmp_path: Path, cell_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch, environment: None
) -> None:
    monkeypatch.setattr(flows.record, "RETRY_EVERY_S", 0.0)
    database, spec, warnings = tmp_path / "mlflow.db", cell_spec(), list[str]()
    recorder = Recorder(f"sqlite:///{database}", None, warnings.append)
    recorder.begin(record_attempt(tmp_path / "run", spec, data_source="", code_hash="c"), tmp_path / "run")
    for step, is_away in ((1, False), (2, True), (3, True), (4, False)):
        if is_away:
            monkeypatch.setattr(MlflowClient, "log_batch", refuse)
        write_entry(tmp_path / "run", report(step))
        recorder.sync(tmp_path / "run")
        monkeypatch.undo()
        monkeypatch.setattr(flows.record, "RETRY_EVERY_S", 0.0)
    assert len(warnings) == 1
    assert "database is locked" in warnings[0]
    history = connect(f"sqlite:///{database}").get_metric_history(str(recorder.run_id), "system/node_1/cpu_percent")
    assert [(metric.step, metric.timestamp) for metric in history] == [(step, 1_000 + step) for step in range(1, 5)]


def refuse(*_: object, **__: object) -> None:
    raise MlflowException("database is locked", TEMPORARILY_UNAVAILABLE)


def test_a_run_that_another_process_put_away_as_a_duplicate_is_left_for_the_one_that_counts(
    tmp_path: Path, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult], environment: None
) -> None:
    spec, folder, database = cell_spec(), tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    (folder / "artifacts").mkdir(parents=True)
    attempt = record_attempt(folder, spec, data_source="", code_hash="c")
    assert training_id(folder) == "run"
    recorder, other = Recorder(database, None, pytest.fail), Recorder(database, None, pytest.fail)
    recorder.begin(attempt, folder)
    write_entry(folder, report(1))
    recorder.sync(folder)
    client = connect(database)
    experiment_id = client.get_run(str(recorder.run_id)).info.experiment_id
    winner = client.create_run(experiment_id, start_time=1, tags={"speck.training": "run"}).info.run_id
    other.begin(attempt, folder)
    assert other.run_id == winner != recorder.run_id
    write_entry(folder, report(2))
    recorder.sync(folder)
    recorder.finish(folder, make_result(spec, 0.25, 0.5))
    assert recorder.run_id == winner
    assert [run.info.run_id for run in client.search_runs([experiment_id])] == [winner]
    assert [metric.step for metric in client.get_metric_history(winner, "train/loss")] == [1, 2]

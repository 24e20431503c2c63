from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import flows.record
from flows.record import LEDGER_FILE, Recorder, flat_params, flat_scores, provenance
from tracking.client import connect
from training.ledger import UsageLog, read_ledger
from training.records import Attempt, JournalEntry, RunResult, write_entry
from training.spec import RunSpec
from training.store import FolderStore


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
    recorder.end(tmp_path, "FAILED")
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
    attempt = Attempt(run_key=spec.run_key, number=1, spec=spec, data_source="", code_hash="c", submitted_ms=1)
    (tmp_path / "run" / "artifacts").mkdir(parents=True)
    UsageLog(FolderStore(tmp_path / "run"), attempt, 2, print).close()
    recorder = Recorder(database, None, print)
    recorder.begin(attempt, tmp_path / "run")
    if is_finished:
        recorder.finish(tmp_path / "run", make_result(spec, 0.25, 0.5))
    else:
        recorder.end(tmp_path / "run", "FAILED")
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


def test_the_commit_is_kept_and_whether_the_tree_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.record, "REPO", tmp_path)
    found = provenance()
    assert (found["mlflow.source.git.commit"], found["speck.dirty"]) == ("unknown", "unknown")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    (tmp_path / "file").write_text("1")
    for arguments in ("init --quiet", "add file", "commit --quiet --message first"):
        assert os.spawnvp(os.P_WAIT, "git", ["git", "-C", str(tmp_path), *arguments.split()]) == 0
    clean = provenance()
    assert len(clean["mlflow.source.git.commit"]) == 40
    assert clean["speck.dirty"] == "False"
    (tmp_path / "file").write_text("2")
    assert provenance() == clean | {"speck.dirty": "True"}


def test_a_machine_without_git_or_user_name_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container often has neither: no git, and a user id without an entry in the list of users."""
    monkeypatch.setenv("PATH", "")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_123)
    found = provenance()
    assert found["mlflow.source.git.commit"] == "unknown"
    assert found["mlflow.user"] == "4000000123"

"""Running one cell, as far as no cluster is needed for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cells import Cancelled, CellRunner
from flows.lease import LeaseLost, lease
from flows.plan import plan_cell
from flows.record import Recorder
from flows.settings import Settings
from training.jobs import CellFailed, Jobs
from training.records import (
    Attempt,
    RunResult,
    hash_files,
    latest_code_hash,
    record_attempt,
    supersede,
    training_id,
    write_result,
)
from training.spec import RunSpec


def no_cluster() -> Jobs:
    raise AssertionError("a cluster was started")


@pytest.fixture
def spec(cell_spec: Callable[..., RunSpec]) -> RunSpec:
    return cell_spec()


@pytest.fixture
def run_folder(settings: Settings, spec: RunSpec) -> Path:
    folder = settings.storage / spec.run_key
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "weights.safetensors").write_bytes(b"weights")
    return folder


def runner(settings: Settings, said: list[str], stop: threading.Event | None = None) -> CellRunner:
    recorder = Recorder(settings.tracking_uri, None, said.append)
    return CellRunner(no_cluster, settings, recorder, said.append, stop or threading.Event())


def test_a_finished_cell_needs_no_cluster_and_no_tracking_store(
    settings: Settings, spec: RunSpec, run_folder: Path, make_result: Callable[..., RunResult]
) -> None:
    code_hash = plan_cell(spec, settings).code_hash
    finished = make_result(spec, 0.25, 0.5, files=hash_files(run_folder, run_folder / "artifacts"), code_hash=code_hash)
    write_result(run_folder, finished)
    record_attempt(run_folder, spec, data_source="", code_hash="c")
    settings.home.joinpath("mlflow.db").write_text("no database")
    said: list[str] = []
    outcome = runner(settings, said).run(plan_cell(spec, settings))
    assert (outcome.result, outcome.reused, outcome.run_id, outcome.seconds) == (finished, True, None, {})
    assert len(said) == 1
    assert list((settings.home / "leases").glob("*.json")) == []


def test_a_stopped_flow_begins_no_cell(settings: Settings, spec: RunSpec) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(AssertionError, match="a cluster was started"):
        runner(settings, []).run(plan_cell(spec, settings))
    with pytest.raises(Cancelled):
        runner(settings, [], stop).run(plan_cell(spec, settings))


def test_a_flow_whose_turn_is_over_begins_no_training(settings: Settings, spec: RunSpec) -> None:
    def over() -> None:
        raise LeaseLost("another one goes ahead")

    late = replace(runner(settings, []), check_turn=over)
    with pytest.raises(LeaseLost, match="another one goes ahead"):
        late.run(plan_cell(spec, settings))
    with lease(settings.storage, spec.run_key, print, lambda: None), pytest.raises(LeaseLost):
        late.run(plan_cell(spec, settings))


def test_a_superseded_training_is_kept_whole_and_the_next_one_has_a_name_of_its_own(
    settings: Settings, spec: RunSpec, run_folder: Path, make_result: Callable[..., RunResult]
) -> None:
    numbers = [record_attempt(run_folder, spec, data_source="", code_hash="c").number for _ in range(2)]
    files = hash_files(run_folder, run_folder / "artifacts")
    write_result(run_folder, make_result(spec, 0.25, 0.5, files=files))
    assert (numbers, training_id(run_folder)) == ([1, 2], spec.run_key)
    aside = supersede(run_folder)
    assert not run_folder.exists()
    assert hash_files(aside, aside / "artifacts") == files
    assert record_attempt(run_folder, spec, data_source="", code_hash="d").submission_id == f"{spec.run_key}-3"
    assert training_id(run_folder) == f"{spec.run_key}.3"
    assert supersede(run_folder) != aside
    assert record_attempt(run_folder, spec, data_source="", code_hash="e").number == 4


class BusyCluster:
    """A cluster where a job of the run lives, and that takes no new one."""

    embedded = False

    def __init__(self, submission_id: str) -> None:
        self.alive, self.stopped = submission_id, list[str]()

    def living(self, run_key: str) -> str:
        assert self.alive.startswith(run_key)
        return self.alive

    def require_room(self, _: RunSpec) -> None:
        """There is always room."""

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)

    def submit(self, attempt: Attempt, *_: Path) -> str:
        raise CellFailed(f"no room for {attempt.submission_id}")


def test_a_job_of_other_code_is_stopped_before_its_folder_is_put_aside(
    settings: Settings, spec: RunSpec, run_folder: Path, make_result: Callable[..., RunResult]
) -> None:
    record_attempt(run_folder, spec, data_source="", code_hash="older")
    write_result(run_folder, make_result(spec, 0.25, 0.5, files=hash_files(run_folder, run_folder / "artifacts")))
    cluster, said = BusyCluster(f"{spec.run_key}-1"), list[str]()
    recorder = Recorder(settings.tracking_uri, None, said.append)
    retraining = CellRunner(
        lambda: cluster,  # type: ignore[arg-type,return-value]
        settings, recorder, said.append, threading.Event(), "retrain",
    )  # fmt: skip
    with pytest.raises(CellFailed, match=f"no room for {spec.run_key}-2"):
        retraining.run(plan_cell(spec, settings, "retrain"))
    assert cluster.stopped == [f"{spec.run_key}-1"]
    assert (settings.home / "superseded" / spec.run_key / spec.run_key / "result.json").is_file()


def test_a_damaged_record_of_an_attempt_stops_no_plan(settings: Settings, spec: RunSpec, run_folder: Path) -> None:
    record_attempt(run_folder, spec, data_source="", code_hash="c")
    (run_folder / "attempts" / "001.json").write_text("")
    assert latest_code_hash(run_folder) is None
    assert plan_cell(spec, settings).state == "train"

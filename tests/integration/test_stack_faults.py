"""Services of a stack that die while a cell trains: what it costs, and that nothing is done twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from chaos.processes import wait_until
from chaos.stack_run import WAIT_S, HeldRun, hold_run, kill_service, make_holdable
from listeners import OPEN_TO_ALL, beyond_loopback, without_token
from services.stack import Running, stack_of_a_copy

from infra.supervision import Supervisor

AWAY_S = 30.0

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with stack_of_a_copy() as running:
        make_holdable(running)
        yield running


def wait_until_well(running: Running) -> None:
    wait_until(lambda: {row["fault"] for row in running.status().values()} == {None}, WAIT_S, "all services", every_s=1)


def test_prefect_away_for_half_a_minute_costs_a_run_nothing(running: Running) -> None:
    run = hold_run(running, seed=1)
    supervisor = Supervisor(running.stack)
    supervisor.stop_service("prefect")
    run.release()
    time.sleep(AWAY_S)
    supervisor.start_service("prefect")
    wait_until_well(running)
    state = running.end(run.run_id)
    assert state["type"] == "COMPLETED", state["message"]
    assert run.jobs() == {f"{run.run_key}-1": "SUCCEEDED"}
    run.assert_whole()


def test_mlflow_and_s3_killed_while_a_cell_trains_lose_nothing(running: Running) -> None:
    run = hold_run(running, seed=2)
    kill_service(running, "mlflow")
    kill_service(running, "s3")
    run.release()
    state = running.end(run.run_id)
    assert state["type"] == "COMPLETED", state["message"]
    wait_until_well(running)
    assert run.jobs() == {f"{run.run_key}-1": "SUCCEEDED"}
    run.assert_whole()


def test_after_the_worker_was_killed_the_next_run_attaches_to_the_job(running: Running) -> None:
    """Nobody is left to tell Prefect that the first run is over, and still the second one is not held back."""
    run = hold_run(running, seed=3)
    kill_service(running, "worker")
    assert running.state(run.run_id)["type"] == "RUNNING"
    wait_until_well(running)
    began = time.monotonic()
    second = run.again()
    attached = f"attaching to Ray job {run.run_key}-1"
    wait_until(lambda: attached in running.log(second), WAIT_S, attached, every_s=0.5)
    print(f"attached {time.monotonic() - began:.0f} s after the command")
    assert running.state(run.run_id)["type"] == "CRASHED"
    run.release()
    assert running.end(second)["type"] == "COMPLETED"
    assert run.jobs() == {f"{run.run_key}-1": "SUCCEEDED"}
    run.assert_whole()


def second_attempt(run: HeldRun) -> bool:
    with suppress(OSError):
        return f"{run.run_key}-2" in run.jobs()
    return False


def test_after_rays_head_was_killed_the_run_goes_on_in_a_second_attempt(running: Running) -> None:
    run = hold_run(running, seed=4)
    kill_service(running, "ray-head")
    wait_until(lambda: second_attempt(run), WAIT_S, "a second attempt", every_s=1)
    run.release()
    state = running.end(run.run_id)
    assert state["type"] == "COMPLETED", state["message"] + running.log(run.run_id)[-3000:]
    wait_until_well(running)
    assert run.jobs() == {f"{run.run_key}-2": "SUCCEEDED"}
    run.assert_whole()


def test_of_what_a_jobs_workers_open_only_torchs_meeting_point_asks_for_no_token(running: Running) -> None:
    run = hold_run(running, 5, "compute.workers=2")
    try:
        answers = {(name, without_token(port)) for name, port in beyond_loopback(running)}
    finally:
        run.release()
    assert {name for name, answer in answers if answer == "refused"} >= OPEN_TO_ALL
    ((name, answer),) = (each for each in answers if each[1] != "refused")
    assert ("TrainWorker" in name, answer) == (True, "no gRPC")
    assert running.end(run.run_id)["type"] == "COMPLETED"

"""What the controller of a Ray Train job is helped with: which error it hears of, and what the driver is told."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray import cloudpickle
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import ErroredState, RunningState, ShuttingDownState
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from training.errors import Diverged
from training.launch import Overseer
from training.retry import classify

PEER_CLOSED = UserExceptionWithTraceback(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed"), "...")
DIED = ActorDiedError(cause=ActorDiedErrorContext(actor_id=b"a" * 16, error_message="... because its node has died."))
NODE_DIED = WorkerHealthCheckFailedError("A worker health check failed.", DIED)


def polled(*errors: Exception | None) -> WorkerGroupPollStatus:
    """What a poll of the workers finds."""
    return WorkerGroupPollStatus(
        {rank: WorkerStatus(running=error is None, error=error) for rank, error in enumerate(errors)}
    )


def seen(overseer: Overseer, *errors: Exception | None) -> set[int]:
    """Ranks whose errors the controller gets to see."""
    status = polled(*errors)
    overseer.after_worker_group_poll_status(status)
    assert not status.finished or all(errors)
    return set(status.errors)


def test_whoever_only_lost_another_worker_is_not_heard_before_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("training.launch.time.monotonic", lambda: now[0])
    overseer = Overseer()
    assert seen(overseer, None, None) == set()
    assert seen(overseer, PEER_CLOSED, None) == set()
    now[0] += 29
    assert seen(overseer, PEER_CLOSED, None) == set()
    assert seen(overseer, PEER_CLOSED, NODE_DIED) == {0, 1}


def test_when_nobody_tells_more_the_lost_connection_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("training.launch.time.monotonic", lambda: now[0])
    overseer = Overseer()
    assert seen(overseer, PEER_CLOSED, PEER_CLOSED) == set()
    now[0] += 31
    assert seen(overseer, PEER_CLOSED, PEER_CLOSED) == {0, 1}
    # A new group of workers has its own patience.
    overseer.after_worker_group_shutdown(None)
    assert seen(overseer, None, None) == set()
    assert seen(overseer, PEER_CLOSED, None) == set()


def test_other_errors_are_heard_at_once() -> None:
    assert seen(Overseer(), None, Diverged("not finite")) == {1}


@pytest.mark.parametrize(("cause", "kind"), [(DIED, "preempted"), (None, "failure")])
def test_the_driver_is_told_what_kept_workers_from_starting(cause: Exception | None, kind: str) -> None:
    startup = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    startup.__cause__ = cause
    failed = ControllerError(startup)
    Overseer().after_controller_state_update(RunningState(), ShuttingDownState(next_state=ErroredState(failed)))
    assert classify(cloudpickle.loads(cloudpickle.dumps(failed))).kind == kind


def test_a_driver_starts_without_torch() -> None:
    """And so does the controller of its workers, which imports the same: torch takes longer to import than all else."""
    told = "import sys, training.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0

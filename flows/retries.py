"""Which failures of a task pass by themselves, so that Prefect tries it again after a pause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import State
from prefect.client.schemas.objects import TaskRun

from data.versioning import DvcLocked
from tracking.client import TrackingUnavailable
from training.jobs import JobLost
from training.store import StorageUnavailable

# A service that does not answer, or a job whose driver or cluster died. What a cell does wrong, it does wrong again.
PASSING = (JobLost, StorageUnavailable, TrackingUnavailable, DvcLocked, ConnectionError, TimeoutError)
# For the restart of a server.
DELAYS_S = (5.0, 20.0, 60.0)
# A cluster's head may take minutes.
CELL_DELAYS_S = (*DELAYS_S, 180.0)


def again_when_it_passes(delays_s: Sequence[float] = DELAYS_S) -> dict[str, Any]:
    """The arguments of a task that is tried again after these pauses where its failure passes."""
    return {"retries": len(delays_s), "retry_delay_seconds": [*delays_s], "retry_condition_fn": passes}


def passes(task: object, task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a task that failed so is worth another try."""
    del task, task_run
    try:
        state.result()
    except PASSING:
        return True
    except BaseException:
        return False
    return False

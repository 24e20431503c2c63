"""What each worker of the Ray Train job does."""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.context import get_train_context

from training.errors import Stopped
from training.records import Attempt
from training.run import run_attempt
from training.say import say_line
from training.spec import ComputeSpec
from training.store import open_store
from training.workers import Workers


def train_worker(config: dict[str, Any]) -> None:
    """Entry point on every worker. `config`: the attempt, the run's address in storage, and the parts of a batch."""
    attempt = Attempt.model_validate(config["attempt"])
    workers = join_workers(attempt.spec.compute)
    try:
        run_attempt(
            attempt,
            open_store(config["run_url"]),
            workers,
            accumulation=config["accumulation"],
            preempting=_is_preempting,
        )
    except Stopped as told:
        # No failure: whoever asked for it must not see the run start again.
        if workers.rank == 0:
            say_line(f"{told}; run it again to go on from there")
    workers.leave()


def join_workers(compute: ComputeSpec) -> Workers:
    """The group of this Ray Train job, with this worker on its share of the node."""
    return Workers.join(compute, ray.train.torch.get_device().index or 0)


def _is_preempting() -> bool:
    # `ray.train.get_preemption_info` says the same after a round of all workers, which no step can afford.
    return get_train_context().preemption_context.preemption_info is not None

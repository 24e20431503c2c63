"""What each worker of the Ray Train job does."""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context

from training.meter import PROGRESS_MARK
from training.records import Attempt
from training.requests import Stopped
from training.run import run_attempt
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
            # A barrier: all ranks report, and rank 0's numbers count.
            reported=lambda metrics: ray.train.report(metrics if workers.rank == 0 else {}),
        )
    except Stopped as told:
        # No failure: whoever asked for it must not see the run start again.
        if workers.rank == 0:
            print(f"{PROGRESS_MARK} {told}; run it again to go on from there", flush=True)


def join_workers(compute: ComputeSpec) -> Workers:
    """The group of this Ray Train job, with this worker on its share of the node."""
    # One compute thread per CPU asked for: more only fight each other on a shared node.
    torch.set_num_threads(max(1, int(compute.cpus_per_worker)))
    on_gpu = compute.gpus_per_worker > 0
    if on_gpu:
        torch.cuda.set_device(ray.train.torch.get_device())
    return Workers.current(on_gpu=on_gpu)


def _is_preempting() -> bool:
    # `ray.train.get_preemption_info` says the same after a round of all workers, which no step can afford.
    return get_train_context().preemption_context.preemption_info is not None

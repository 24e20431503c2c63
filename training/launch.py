"""The Ray Train job around the loop: placement, and what its processes do on a signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerCallback

from training.meter import ERROR_MARK, PROGRESS_MARK
from training.records import Attempt
from training.run import leave_on_sigterm
from training.spec import ComputeSpec
from training.worker import train_worker


def build_trainer(attempt: Attempt, run_folder: Path, *, accumulation: int) -> TorchTrainer:
    """A trainer of one attempt, which goes on from the run's newest checkpoint."""
    return on_workers(
        train_worker,
        {"attempt": attempt.model_dump(mode="json"), "run_url": str(run_folder), "accumulation": accumulation},
        attempt.spec.compute,
        run_folder,
        callbacks=[LeaveOnSigterm()],
    )


def on_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    compute: ComputeSpec,
    folder: Path,
    **run_config: Any,
) -> TorchTrainer:
    """A Ray Train run of `worker(config)` on every worker, which keeps its state in `folder` on shared storage."""
    on_gpu = compute.gpus_per_worker > 0
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    return TorchTrainer(
        worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            elastic_resize_monitor_interval_s=compute.resize_every_s,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            placement_strategy=compute.placement,
            accelerator_type=compute.accelerator,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            # Ray's own defaults for the last two are infinite.
            failure_config=FailureConfig(
                max_failures=compute.max_failures,
                max_preemption_failures=compute.max_failures,
                controller_failure_limit=compute.max_failures,
            ),
            **run_config,
        ),
    )


class LeaveOnSigterm(WorkerCallback):
    """Ray runs a worker's training in a thread, in which no handler can be set: this runs in the main thread."""

    def after_init_train_context(self) -> None:
        """Set the handler."""
        leave_on_sigterm()


@contextmanager
def causes_told() -> Iterator[None]:
    """Print what goes wrong inside in lines that whoever follows the job takes for the cause, worker by worker."""
    try:
        yield
    except WorkerGroupError as error:
        for rank, cause in sorted(error.worker_failures.items()):
            lines = str(cause).strip().splitlines() or [repr(cause)]
            print(f"{PROGRESS_MARK} {ERROR_MARK} worker {rank}: {lines[-1]}", flush=True)
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(f"{PROGRESS_MARK} {ERROR_MARK} {type(error).__name__}: {lines[-1]}", flush=True)
        raise

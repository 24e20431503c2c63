"""The Ray Train job around the loop: placement, failures, checkpoints kept, and the journal."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from training.checkpoint import NUM_CHECKPOINTS_KEPT
from training.meter import ERROR_MARK, PROGRESS_MARK
from training.records import Attempt, journal_entry, write_entry
from training.spec import ComputeSpec
from training.worker import train_worker


def build_trainer(attempt: Attempt, run_folder: Path) -> TorchTrainer:
    """A trainer named by the run key: built again with the same name, it continues the run."""
    return on_workers(
        train_worker,
        {"attempt": attempt.model_dump(mode="json"), "run_folder": str(run_folder)},
        attempt.spec.compute,
        run_folder,
        checkpoint_config=CheckpointConfig(num_to_keep=NUM_CHECKPOINTS_KEPT),
        callbacks=[JournalCallback(run_folder, attempt)],
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
        scaling_config=ScalingConfig(num_workers=compute.workers, use_gpu=on_gpu, resources_per_worker=resources),
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


class JournalCallback(UserCallback):
    """Writes one journal object per report, in the controller. An exception here would end the run: none leaves."""

    def __init__(self, run_folder: Path, attempt: Attempt) -> None:
        self.run_folder, self.attempt = run_folder, attempt

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Keep what rank 0 reported at the end of an epoch."""
        del run_context, checkpoint
        try:
            if "step" in metrics[0]:
                write_entry(self.run_folder, journal_entry(self.attempt, metrics[0]))
        except Exception:
            traceback.print_exc()

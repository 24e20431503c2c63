"""What each worker of the Ray Train job does: fetch the data, train, score, put the results away."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from data.image_cache import picture_folder
from data.store import default_root, on_this_node
from training.artifacts import write_artifacts
from training.checkpoint import CorruptCheckpoint, newest_first, verify_checkpoint
from training.loop import Hooks, train
from training.meter import PROGRESS_MARK, Progress
from training.records import Attempt, complete_journal, split_finite
from training.scoring import score_split
from training.spec import ComputeSpec
from training.state import WarmStart, warm_start_path
from training.system import SystemMeter
from training.workers import Workers


def train_worker(config: dict[str, Any]) -> None:
    """Entry point on every worker. `config`: the attempt, and the run folder on shared storage."""
    attempt = Attempt.model_validate(config["attempt"])
    run_folder = Path(config["run_folder"])
    spec = attempt.spec
    started = time.monotonic()
    workers = join_workers(spec.compute)
    dataset_folder = on_this_node(spec.dataset.name, spec.dataset.version, attempt.data_source)
    cache_folder = picture_folder(default_root(), spec.dataset.version)
    checkpoint = workers.broadcast(_newest_valid_checkpoint(run_folder) if workers.rank == 0 else None)
    if checkpoint is not None and workers.rank == 0:
        complete_journal(run_folder, attempt, checkpoint)
    who = f"{workers.world_size} worker" + "s" * (workers.world_size > 1)
    where = f"resuming from {checkpoint.name}" if checkpoint else "starting at epoch 1"
    _say(workers, f"data ready on {who} after {time.monotonic() - started:.1f} s, {where}")
    hooks = Hooks(
        report=_reporter(workers),
        progress=lambda news: _say(workers, _line(news)),
        warm_started=lambda taken: _say(workers, _warm_start_line(taken)),
        skipped=lambda paths: _say(workers, _skipped_line(paths)),
    )
    weights = spec.training.warm_start
    initial_weights = None if weights is None else warm_start_path(run_folder.parent, weights)
    state, validation = train(spec, dataset_folder, workers, hooks, checkpoint, initial_weights, cache_folder)
    trained = time.monotonic()
    _say(workers, "scoring on the test split")
    # Val chooses the thresholds by which test is judged.
    chosen = None if validation is None else validation.analysis.operating_point
    test = score_split(spec, state.average.module, dataset_folder, "test", workers, operating_point=chosen)
    if validation is not None and test is not None:
        seconds = {"train": trained - started, "score_test": time.monotonic() - trained}
        final = state.average.module.state_dict()
        write_artifacts(spec, final, {"val": validation, "test": test}, seconds, dataset_folder, run_folder)
    # A barrier: no worker may leave while rank 0 still writes.
    ray.train.report({})


def join_workers(compute: ComputeSpec) -> Workers:
    """The group of this Ray Train job, with this worker on its share of the node."""
    # One compute thread per CPU asked for: more only fight each other on a shared node.
    torch.set_num_threads(max(1, int(compute.cpus_per_worker)))
    on_gpu = compute.gpus_per_worker > 0
    if on_gpu:
        torch.cuda.set_device(ray.train.torch.get_device())
    return Workers.current(on_gpu=on_gpu)


def _newest_valid_checkpoint(run_folder: Path) -> Path | None:
    for folder in newest_first(run_folder):
        try:
            verify_checkpoint(folder)
        except CorruptCheckpoint as error:
            print(f"{PROGRESS_MARK} skipping a checkpoint: {error}", flush=True)
        else:
            return folder
    return None


def _reporter(workers: Workers) -> Callable[[dict[str, float], int, int, Callable[..., object]], None]:
    system = SystemMeter()

    def report(metrics: dict[str, float], step: int, epoch: int, save: Callable[..., object]) -> None:
        stamped = metrics | system.read() | {"step": step, "epoch": epoch, "timestamp_ms": time.time_ns() // 1_000_000}
        with tempfile.TemporaryDirectory(prefix="speck-checkpoint-") as folder:
            if workers.rank == 0:
                save(Path(folder), split_finite(stamped)[0])
                ray.train.report(stamped, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report({})

    return report


def _line(news: Progress) -> str:
    minutes, seconds = divmod(int(news.eta_s), 60)
    return (
        f"epoch {news.epoch}/{news.epochs} step {news.step}/{news.steps} loss {news.loss:.3f} "
        f"{news.images_per_s:.1f} img/s ETA {minutes}:{seconds:02d}"
    )


def _warm_start_line(taken: WarmStart) -> str:
    left = f", left as initialised: {', '.join(taken.left)}" if taken.left else ""
    return f"warm start: {taken.num_taken} of {taken.num_taken + len(taken.left)} tensors taken{left}"


def _skipped_line(paths: list[Path]) -> str:
    return f"skipped {len(paths)} training images that cannot be read: {', '.join(str(path) for path in paths)}"


def _say(workers: Workers, message: str) -> None:
    if workers.rank == 0:
        print(f"{PROGRESS_MARK} {message}", flush=True)

"""One of two processes that train and score together: `python gloo_worker.py RANK FOLDER`.

FOLDER/job.json names the specs and datasets; what this rank saw goes to FOLDER/rank_<R>.pt.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import models
from models.interface import Losses, Targets
from models.yolox import Yolox
from training.loop import Hooks, train
from training.scoring import score_split
from training.spec import RunSpec
from training.state import build_model
from training.sync_batch_norm import convert
from training.workers import Workers


def run_all(folder: Path, workers: Workers) -> dict[str, Any]:
    """What the job asks for, the same lines for one process and for two."""
    job = json.loads((folder / "job.json").read_text())
    specs = {name: RunSpec.model_validate(content) for name, content in job["specs"].items()}
    datasets = {name: Path(path) for name, path in job["datasets"].items()}
    return {
        "first_step": first_step(specs["first_step"], datasets["same_pixels"], workers),
        "scored": scored(specs["scored"], datasets["tiny"], workers),
        **(together(specs["trained"], datasets["tiny"], job["families"], workers) if workers.world_size > 1 else {}),
    }


def together(spec: RunSpec, dataset: Path, families: dict[str, dict[str, Any]], workers: Workers) -> dict[str, Any]:
    """What needs two."""
    return {
        "trained": trained(spec, dataset, workers),
        "empty": {
            name: step_without_objects_on_the_last_rank(name, settings, workers) for name, settings in families.items()
        },
    }


def step_without_objects_on_the_last_rank(
    name: str, settings: dict[str, Any], workers: Workers
) -> dict[str, tuple[bool, float, float]]:
    """For every parameter: whether its gradient is finite, its sum and the sum of its absolute values."""
    torch.manual_seed(0)
    detector: Any = models.build(name, num_classes=3, **settings)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 4.0, 9.0, 10.0], [20.0, 8.0, 36.0, 22.0], [30.0, 30.0, 60.0, 62.0]])
    count = 0 if workers.rank == 1 else len(boxes)
    none = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        boxes[:count], torch.arange(3)[:count], torch.zeros(count, dtype=torch.int64), torch.zeros(0, 4), none
    )
    parallel = DistributedDataParallel(convert(detector, workers.device))
    losses = detector.criterion(parallel(images), targets, closing=True)
    counts = workers.sum(torch.stack([losses.counts[term] for term in losses.sums])).clamp(min=1)
    (torch.stack(list(losses.sums.values())) / counts).sum().backward()
    gradients = {key: parameter.grad.double() for key, parameter in detector.named_parameters()}
    return {
        key: (bool(gradient.isfinite().all()), float(gradient.sum()), float(gradient.abs().sum()))
        for key, gradient in gradients.items()
    }


def first_step(spec: RunSpec, dataset: Path, workers: Workers) -> dict[str, Any]:
    """Metrics of an epoch of one step, and the weights before and after it."""
    reports: list[dict[str, float]] = []
    hooks = Hooks(lambda metrics, *_: reports.append(metrics))
    state, _ = train(spec, dataset, workers, hooks)
    torch.manual_seed(spec.seed)
    return {
        "initial": build_model(spec).state_dict(), "metrics": reports[0], "weights": state.model.state_dict(),
    }  # fmt: skip


def scored(spec: RunSpec, dataset: Path, workers: Workers) -> dict[str, Any] | None:
    """Detections of an untrained model, the same on every rank."""
    torch.manual_seed(3)
    result = score_split(spec, build_model(spec), dataset, "test", workers)
    return None if result is None else {"detections": result.detections, "counts": result.result.counts}


def trained(spec: RunSpec, dataset: Path, workers: Workers) -> dict[str, Any]:
    """An epoch in which the last rank alone meets a loss that is not finite, in its second step."""
    criterion, calls = Yolox.criterion, 0

    def spoilt(self: Yolox, *arguments: Any, **options: Any) -> Losses:
        nonlocal calls
        calls += 1
        losses = criterion(self, *arguments, **options)
        factor = float("nan") if calls == 2 and workers.rank == workers.world_size - 1 else 1.0
        return Losses({name: value * factor for name, value in losses.sums.items()}, losses.counts, losses.metrics)

    Yolox.criterion = spoilt  # type: ignore[method-assign]
    reports: list[dict[str, float]] = []
    state, _ = train(spec, dataset, workers, Hooks(lambda metrics, *_: reports.append(metrics)))
    return {
        "metrics": reports[0], "steps": state.step,
        "weights": state.model.state_dict(), "average": state.average.state_dict(),
    }  # fmt: skip


def join_and_run(rank: int, folder: Path) -> dict[str, Any]:
    """Run as one of two."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), rank=rank, world_size=2)
    try:
        return run_all(folder, Workers.current())
    finally:
        dist.destroy_process_group()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.save(join_and_run(rank, folder), folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main()

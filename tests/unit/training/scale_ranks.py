"""Trainings and single steps on one rank of a group, see `gloo.on_all_ranks`; FOLDER/job.json says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.interface import Targets
from training.feeding import to_device, training_data
from training.loop import Hooks, train
from training.requests import Asked
from training.shares import StepClock
from training.spec import RunSpec
from training.state import build_model, build_state
from training.step import accumulate, forward_backward
from training.workers import Workers


def run(folder: Path) -> dict[str, Any]:
    """What each job gives that asks for a group of this size, by the job's name."""
    workers = Workers.current()
    results = {}
    for name, job in json.loads((folder / "job.json").read_text()).items():
        if workers.world_size in job["groups"]:
            build = (lambda spec: build_model(spec).double()) if job["float64"] else build_model
            with patch("training.state.build_model", build):
                what = {"trained": trained, "in_parts": in_parts}[job["what"]]
                results[name] = what(RunSpec.model_validate(job["spec"]), folder / "prepared", workers)
    return results


def trained(spec: RunSpec, dataset: Path, workers: Workers) -> dict[str, Any]:
    """The loss terms of every epoch, of one step each, and all tensors of the model and its average in the end."""
    curve: list[dict[str, float]] = []

    def keep(metrics: dict[str, float], *_: object) -> None:
        curve.append({name: value for name, value in metrics.items() if name.startswith("train/loss")})

    state, _ = train(spec, dataset, workers, Hooks(report=keep))
    return {"curve": curve, "tensors": {**state.model.state_dict(), **state.average.state_dict()}}


def in_parts(spec: RunSpec, dataset: Path, workers: Workers) -> dict[int, dict[str, Any]]:
    """Losses and gradients of one global batch, of which every rank has its share, in 1, 2 and 3 parts.

    Batch normalisation goes by statistics that it keeps, those of the whole batch: in training every part has its own.
    """
    torch.manual_seed(spec.seed)
    state = build_state(spec, workers.device)
    normalise_by(state.model, share(spec, dataset, Workers(0, 1, workers.device))[0])
    images, targets = share(spec, dataset, workers)
    parallel = state.model if workers.world_size == 1 else DistributedDataParallel(state.model)
    seen = {}
    for parts in (1, 2, 3):
        common = (workers, StepClock(workers.device), spec.training)
        if parts == 1:
            step = forward_backward(state, parallel, images, targets, *common, closing=True, asked=Asked())
        else:
            state.optimizer.zero_grad()
            step = accumulate(
                state, images, targets, *common, parts=min(parts, len(images)), closing=True, asked=Asked()
            )
        gradients = {name: parameter.grad.clone() for name, parameter in state.model.named_parameters()}
        seen[parts] = {"means": step.means, "gradients": gradients}
    return seen


def share(spec: RunSpec, dataset: Path, workers: Workers) -> tuple[Tensor, Targets]:
    """This worker's part of the first batch."""
    pictures, sampler, loader = training_data(spec, dataset, workers, None)
    pictures.set_epoch(0, joins=True)
    sampler.set_epoch(0)
    return to_device(next(iter(loader)), workers.device)


def normalise_by(model: nn.Module, images: Tensor) -> None:
    """From now on batch normalisation goes by the statistics of these images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    model.eval()

"""How long a step takes here, for a plan: a few steps on noise, before anything was trained."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from models.interface import Detector, Targets
from training.spec import RunSpec
from training.state import build_trainable

OBJECTS_PER_IMAGE = 10


@dataclass(frozen=True)
class Probe:
    """Seconds per image on one worker, and the bytes of one checkpoint."""

    train_s_per_image: float
    score_s_per_image: float
    checkpoint_bytes: int


def probe(spec: RunSpec) -> Probe | None:
    """Time training and inference of the spec's model; None if its workers have GPUs and this machine has none."""
    on_gpu = spec.compute.gpus_per_worker > 0
    if on_gpu and not torch.cuda.is_available():
        return None
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(max(1, int(spec.compute.cpus_per_worker)))
    try:
        return _measure(spec, torch.device("cuda" if on_gpu else "cpu"))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        if on_gpu:
            # The memory is the cells', which are other processes.
            torch.cuda.empty_cache()


def _measure(spec: RunSpec, device: torch.device) -> Probe:
    model = build_trainable(spec, device)
    side, share = spec.training.input_size_px, max(1, spec.training.batch_size // spec.compute.max_workers)
    if device.type == "cpu":
        # There an image takes about as long in a larger batch, and plans are waited for. At 32 px the coarsest map of
        # one image is one value, which has no variance to normalise by.
        share = min(share, 1 if side >= 64 else 2)
    images = torch.rand(share, 3, side, side, device=device).mul_(255).contiguous(memory_format=torch.channels_last)
    targets = _targets(share, side, device)
    # The first pass allocates and chooses kernels.
    _gradient(spec, model, images, targets)
    train_s = _gradient(spec, model, images, targets)
    model.eval()
    score_s = _infer(spec, model, images)
    return Probe(train_s / share, score_s / share, _checkpoint_bytes(spec, model))


def _gradient(spec: RunSpec, model: nn.Module, images: torch.Tensor, targets: Targets) -> float:
    """Seconds of a step without the update of the weights: that is a few percent of it, and torch's optimisers take
    longer to import than all passes here."""
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.training.precision == "bf16"):
        predictions = model(images)
    losses = cast(Detector, model).criterion(predictions, targets)
    torch.stack([loss / losses.counts[name].clamp(min=1) for name, loss in losses.sums.items()]).sum().backward()
    _finish(images.device)
    return time.perf_counter() - started


@torch.no_grad()
def _infer(spec: RunSpec, model: nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.training.precision == "bf16"):
        model(images)
    _finish(images.device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _targets(num_images: int, side_px: int, device: torch.device) -> Targets:
    corners = torch.rand(num_images * OBJECTS_PER_IMAGE, 2, device=device) * (side_px - 24)
    return Targets(
        boxes_xyxy_px=torch.cat((corners, corners + 20), dim=1),
        labels=torch.zeros(len(corners), dtype=torch.int64, device=device),
        image_index=torch.arange(num_images, device=device).repeat_interleave(OBJECTS_PER_IMAGE),
        ignore_xyxy_px=torch.zeros(0, 4, device=device),
        ignore_image_index=torch.zeros(0, dtype=torch.int64, device=device),
    )


def _checkpoint_bytes(spec: RunSpec, model: nn.Module) -> int:
    """Weights and their average, and what the optimiser keeps of every trained weight: two moments, or one."""
    weights: int = sum(value.nbytes for value in model.state_dict().values())
    trained: int = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    return 2 * weights + (2 if spec.training.optimizer == "adamw" else 1) * trained

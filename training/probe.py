"""How long a step takes here, for a plan: a few steps on noise, before anything was trained."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from models.interface import Targets
from training.spec import RunSpec
from training.state import TrainingState, build_state

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
    state = build_state(spec, device)
    share = max(1, spec.training.batch_size // spec.compute.max_workers)
    side = spec.training.input_size_px
    images = torch.rand(share, 3, side, side, device=device).mul_(255).contiguous(memory_format=torch.channels_last)
    targets = _targets(share, side, device)
    # The first pass allocates and chooses kernels.
    _step(spec, state, images, targets)
    train_s = _step(spec, state, images, targets)
    state.model.eval()
    _infer(spec, state, images)
    score_s = _infer(spec, state, images)
    return Probe(train_s / share, score_s / share, _checkpoint_bytes(state))


def _step(spec: RunSpec, state: TrainingState, images: torch.Tensor, targets: Targets) -> float:
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.training.precision == "bf16"):
        predictions = state.model(images)
    losses = state.detector.criterion(predictions, targets)
    state.optimizer.zero_grad(set_to_none=True)
    torch.stack([loss / losses.counts[name].clamp(min=1) for name, loss in losses.sums.items()]).sum().backward()
    state.optimizer.step()
    state.average.update_parameters(state.model)
    _finish(images.device)
    return time.perf_counter() - started


@torch.no_grad()
def _infer(spec: RunSpec, state: TrainingState, images: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.training.precision == "bf16"):
        state.model(images)
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


def _checkpoint_bytes(state: TrainingState) -> int:
    tensors = [*state.model.state_dict().values(), *state.average.state_dict().values()]
    tensors += [slot for slots in state.optimizer.state.values() for slot in slots.values() if torch.is_tensor(slot)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

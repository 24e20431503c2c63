"""`python -m tests.bench_gpu`: training steps on a GPU: images/s, memory, and the share of the GPU's matrix products.

Each line reads: architecture, input size, eager or compiled, images/s (median of the steps), peak memory, and
operations per second as a share of what bf16 products of 8192 x 8192 matrices reach on the same GPU in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from models.interface import Targets
from tests.conftest import CARD
from training.requests import Asked
from training.shares import StepClock
from training.spec import ArchitectureSpec, ComputeSpec, DatasetSpec, RunSpec, TrainingSpec
from training.state import build_state, set_training_mode
from training.step import forward_backward
from training.workers import Workers

ARCHITECTURES = "yolox-s,yolox-l,yolox-x,gf-fpn-l,csf-net-m,foreground-probe-x"
OBJECTS_PER_IMAGE = 70
WARMUP = 5


def main(arguments: list[str] | None = None) -> None:
    """All combinations; one that does not fit into memory says so, and the others go on."""
    chosen = _arguments(arguments)
    device = torch.device(chosen.device)
    peak = matmul_peak_per_s(device, chosen.matrix)
    print(f"{chosen.device}: bf16 matrix products at {peak / 1e12:.2f} TFLOP/s", flush=True)
    for name in chosen.architectures.split(","):
        for size_px in (int(size) for size in chosen.sizes.split(",")):
            for compiled in (False, True) if chosen.compile else (False,):
                what = f"{name} {size_px} px batch {chosen.batch} {'compiled' if compiled else 'eager'}"
                try:
                    images_per_s, gib, flops_per_s = step_speed(
                        name, size_px, chosen.batch, device, compiled, chosen.steps
                    )
                except torch.OutOfMemoryError:
                    print(f"{what}: out of memory", flush=True)
                    continue
                share = flops_per_s / peak
                print(f"{what}: {images_per_s:.1f} images/s, {gib:.2f} GiB, {share:.1%} of the products", flush=True)


def step_speed(
    name: str, size_px: int, batch: int, device: torch.device, compiled: bool, num_steps: int
) -> tuple[float, float, float]:
    """Images/s, peak memory in GiB (0 on a CPU) and operations/s of bf16 training steps, optimiser included."""
    spec = _spec(name, size_px, batch)
    torch.manual_seed(0)
    state, alone = build_state(spec, device), Workers(0, 1, device)
    set_training_mode(state.model, spec)
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = _targets(batch, size_px, device)
    clock = StepClock(device)

    def step() -> None:
        forward_backward(state, state.model, images, targets, alone, clock, spec.training, closing=False, asked=Asked())
        state.optimizer.step()
        state.average.update_parameters(state.model)

    with FlopCounterMode(display=False) as flops, torch.autocast(device.type, torch.bfloat16):
        state.model(images)
    if compiled:
        state.model.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _timed(step, num_steps, device)
    gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    # A backward pass multiplies twice as much as the forward pass.
    return batch / seconds, gib, 3 * flops.get_total_flops() / seconds


def matmul_peak_per_s(device: torch.device, size: int) -> float:
    """Operations per second of square bf16 matrix products."""
    one, two = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _timed(lambda: one @ two, 10, device)


def _timed(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds of a call, after WARMUP of them."""
    times = []
    for _ in range(WARMUP + repeats):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP:])


def _spec(name: str, size_px: int, batch: int) -> RunSpec:
    return RunSpec(
        architecture=ArchitectureSpec(name=name, settings=vars(models.configure(name))),
        dataset=DatasetSpec(name=CARD.name, version="0" * 32, card=CARD),
        training=TrainingSpec(input_size_px=size_px, batch_size=batch, precision="bf16"),
        compute=ComputeSpec(workers=1),
    )


def _targets(batch: int, size_px: int, device: torch.device) -> Targets:
    corners = torch.rand(batch * OBJECTS_PER_IMAGE, 2, device=device) * (size_px - 24)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Targets(
        boxes_xyxy_px=torch.cat((corners, corners + 20), dim=1),
        labels=torch.zeros(len(corners), dtype=torch.int64, device=device),
        image_index=torch.arange(batch, device=device).repeat_interleave(OBJECTS_PER_IMAGE),
        ignore_xyxy_px=torch.zeros(0, 4, device=device),
        ignore_image_index=none,
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", default=ARCHITECTURES)
    parser.add_argument("--sizes", default="640,960")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--matrix", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

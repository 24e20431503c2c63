"""`make bench`: speed as ratios, both sides interleaved in one run, medians. Nothing here is asserted.

Each line reads: what, the two medians, their ratio. Machines are shared and noisy; ratios travel, seconds do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

import models
from models.interface import Targets

REPEATS = 7


def main() -> None:
    """Run all comparisons on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("yolox-nano", "yolox-tiny"):
        step_in_bf16_against_fp32(name)
    assignment_against_step("yolox-tiny")


def step_in_bf16_against_fp32(name: str, size_px: int = 320, batch: int = 8) -> None:
    """A training step under bf16 autocast and channels_last against plain fp32."""
    plain, fast = _detector(name), _detector(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8)
    targets = _targets(batch, per_image=25, size_px=size_px)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    compare(
        f"{name} step at {size_px} px, batch {batch}: fp32 against bf16 + channels_last",
        lambda: _step(plain, images, targets, bf16=False),
        lambda: _step(fast, channels_last, targets, bf16=True),
    )


def assignment_against_step(name: str, size_px: int = 640, batch: int = 2, per_image: int = 200) -> None:
    """SimOTA's share of a training step with many objects."""
    detector = _detector(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = _targets(batch, per_image=per_image, size_px=size_px)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector(images)
    compare(
        f"{name} at {size_px} px, {per_image} objects per image: whole step against the criterion's forward",
        lambda: _step(detector, images, targets, bf16=True),
        lambda: cast(Any, detector).criterion(predictions, targets),
    )


def compare(title: str, first: Callable[[], object], second: Callable[[], object]) -> None:
    """Print both medians and first / second."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for action, times in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
    one, two = (statistics.median(times) for times in seconds)
    print(f"{title}: {one:.3f} s / {two:.3f} s = {one / two:.2f}", flush=True)


def _detector(name: str) -> nn.Module:
    return cast(nn.Module, models.build(name, num_classes=4))


def _targets(batch: int, *, per_image: int, size_px: int) -> Targets:
    count = batch * per_image
    corners = torch.rand(count, 2) * (size_px - 24)
    boxes = torch.cat([corners, corners + 4 + 20 * torch.rand(count, 2)], dim=1)
    index = torch.arange(batch).repeat_interleave(per_image)
    empty = torch.zeros(0, dtype=torch.int64)
    return Targets(boxes, torch.randint(0, 4, (count,)), index, torch.zeros(0, 4), empty)


def _step(detector: nn.Module, images: torch.Tensor, targets: Targets, *, bf16: bool) -> None:
    detector.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        predictions = detector(images)
    losses = cast(Any, detector).criterion(predictions, targets)
    sum(total / losses.counts[term].clamp(min=1) for term, total in losses.sums.items()).backward()


if __name__ == "__main__":
    main()

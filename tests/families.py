"""The smallest of every family of architectures, and of those with one size a smaller one still; what they predict.

A file of `models/` that has none among them adds the first of its rows by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import models
from models.interface import Targets

NUM_IMAGES = 8
SIDE_PX = 128
NUM_OBJECTS = 6
COLOURS = torch.tensor([[40.0, 180.0, 220.0], [200.0, 60.0, 60.0]])
SMALLEST: dict[str, dict[str, float]] = {
    **{name: {} for name in ("yolox-nano", "yolox-n-p2", "yolov8-n", "yolov8-n-p2", "csf-net-n")},
    **{name: {} for name in ("fpn-n", "panet-n", "gf-fpn-n", "foreground-probe-n")},
    **{name: {"depth": 0.33, "width": 0.25} for name in ("bifpn-l", "afpn-l", "gf-fpn-l-darknet53")},
}
_KNOWN = {models.ARCHITECTURES[name].build.__module__ for name in SMALLEST}
_FIRST = {row.build.__module__: row.name for row in reversed(models.ARCHITECTURES.values())}
SMALLEST |= {name: {} for module, name in _FIRST.items() if module not in _KNOWN}


def tensors(predictions: object) -> dict[str, torch.Tensor]:
    """All raw predictions that are numbers, not indices, also those of predictions within predictions."""
    found: dict[str, torch.Tensor] = {}
    for name, value in vars(predictions).items():
        if dataclasses.is_dataclass(value):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()}
        elif value.is_floating_point():
            found[name] = value
    return found


def scene() -> tuple[torch.Tensor, Targets]:
    """Grey noise with rectangles of 6 to 12 px in two colours, two pixels or more apart."""
    generator = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    images = torch.randint(90, 110, (NUM_IMAGES, 3, SIDE_PX, SIDE_PX), generator=generator).float()
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for image in range(NUM_IMAGES):
        placed: list[tuple[int, int, int, int]] = []
        while len(placed) < NUM_OBJECTS:
            width, height = integer(6, 13), integer(6, 13)
            x, y = integer(0, SIDE_PX - width), integer(0, SIDE_PX - height)
            near = (x - 2, y - 2, x + width + 2, y + height + 2)
            if any(near[0] < b[2] and b[0] < near[2] and near[1] < b[3] and b[1] < near[3] for b in placed):
                continue
            placed.append((x, y, x + width, y + height))
            labels.append(integer(0, 2))
            images[image, :, y : y + height, x : x + width] = COLOURS[labels[-1]].view(3, 1, 1)
        boxes += placed
    return images, Targets(
        torch.tensor(boxes).float(),
        torch.tensor(labels),
        torch.arange(NUM_IMAGES).repeat_interleave(NUM_OBJECTS),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )


def total_loss(detector: Any, images: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The sum of all terms, each by its count."""
    losses = detector.criterion(detector(images), targets)
    return torch.stack([value / losses.counts[term].clamp(min=1) for term, value in losses.sums.items()]).sum()


def taught(detector: Any, num_steps: int = 30) -> Any:
    """After a few steps: unlike before, its scores differ by more than rounding does."""
    torch.manual_seed(0)
    images, targets = scene()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        total_loss(detector.train(), images, targets).backward()
        optimizer.step()
    return detector.eval()

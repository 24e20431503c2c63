"""`Sample` and `Batch`: what the loader hands to the training loop.

Legend: B images, S input side, G ground truths, R ignore regions. All boxes are float32 `xyxy` in input pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One picture as the network sees it.

    `image` uint8 (3, S, S), BGR; `boxes_xyxy_px` (G, 4); `labels` int64 (G,); `ignore_xyxy_px` (R, 4);
    `scale` input pixels per original pixel and `original_hw` of the picture `image_id`. They turn boxes back into the
    original frame (divide by `scale`) for plain and flipped-free samples only: augmentation has no way back.
    """

    image: Tensor
    boxes_xyxy_px: Tensor
    labels: Tensor
    ignore_xyxy_px: Tensor
    image_id: int
    scale: float
    original_hw: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Samples joined in order; `image_index` and `ignore_image_index` int64 say which image a row belongs to.

    `images` uint8 (B, 3, S, S) in channels_last memory; `boxes_xyxy_px` (G, 4); `labels` (G,); `ignore_xyxy_px` (R, 4);
    `scales` float32 (B,).
    """

    images: Tensor
    boxes_xyxy_px: Tensor
    labels: Tensor
    image_index: Tensor
    ignore_xyxy_px: Tensor
    ignore_image_index: Tensor
    image_ids: tuple[int, ...]
    scales: Tensor
    original_hw: tuple[tuple[int, int], ...]

    def pin_memory(self) -> Self:
        """Copy into page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return type(self)(**values | pinned)


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples of one input size into a batch."""
    return Batch(
        images=torch.stack([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
        boxes_xyxy_px=torch.cat([sample.boxes_xyxy_px for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        image_index=_index([len(sample.labels) for sample in samples]),
        ignore_xyxy_px=torch.cat([sample.ignore_xyxy_px for sample in samples]),
        ignore_image_index=_index([len(sample.ignore_xyxy_px) for sample in samples]),
        image_ids=tuple(sample.image_id for sample in samples),
        scales=torch.tensor([sample.scale for sample in samples], dtype=torch.float32),
        original_hw=tuple(sample.original_hw for sample in samples),
    )


def _index(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))

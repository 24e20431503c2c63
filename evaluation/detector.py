"""From a detector and a loader to COCO results in original-image pixels, and from stored weights to their score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.loader import Batch
from evaluation.checks import CocoDetection
from models.interface import Detections, Detector, PostprocessConfig


class Detected(NamedTuple):
    """COCO results of all images, in loader order and by descending score within an image.

    `counts`: `num_detected_images`, and what was left out: `num_dropped_candidates` (by the cap before non-maximum
    suppression), `num_degenerate_boxes` (no area left inside the image) and `num_non_finite_boxes`.
    """

    detections: list[CocoDetection]
    counts: dict[str, int]


def detect(
    detector: Detector,
    loader: Iterable[Batch],
    config: PostprocessConfig,
    *,
    device: torch.device,
    bf16: bool,
    observe: Callable[[Any, Batch], None] | None = None,
) -> Detected:
    """Detections of every image of `loader`; the detector's training and evaluation modes are restored afterwards.

    `bf16` runs the forward pass under autocast. Boxes are divided by the letterbox scale and clipped to the image;
    `category_id` is label + 1. `observe` is shown the raw predictions of every batch, such as a `ForegroundObserver`.
    """
    found: list[CocoDetection] = []
    counts = dict.fromkeys(
        ("num_detected_images", "num_dropped_candidates", "num_degenerate_boxes", "num_non_finite_boxes"), 0
    )
    with _evaluating(cast(nn.Module, detector)), torch.inference_mode():
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                predictions = detector(images)
            if observe is not None:
                observe(predictions, batch)
            for detections, image_id, scale, (height_px, width_px) in zip(
                detector.postprocess(predictions, config),
                batch.image_ids,
                batch.scales.tolist(),
                batch.original_hw,
                strict=True,
            ):
                entries, num_degenerate, num_non_finite = _entries(detections, image_id, scale, width_px, height_px)
                found += entries
                counts["num_detected_images"] += 1
                counts["num_dropped_candidates"] += detections.num_dropped_candidates
                counts["num_degenerate_boxes"] += num_degenerate
                counts["num_non_finite_boxes"] += num_non_finite
    return Detected(found, counts)


def _entries(
    detections: Detections, image_id: int, scale: float, width_px: int, height_px: int
) -> tuple[list[CocoDetection], int, int]:
    """COCO results of one image, the number of degenerate and the number of non-finite boxes left out."""
    boxes_xyxy_px: NDArray[np.float64] = detections.boxes_xyxy_px.double().cpu().numpy() / scale
    scores: NDArray[np.float64] = detections.scores.double().cpu().numpy()
    category_ids: NDArray[np.int64] = detections.labels.cpu().numpy() + 1
    finite = np.isfinite(boxes_xyxy_px).all(axis=1) & np.isfinite(scores)
    boxes_xyxy_px = boxes_xyxy_px.clip(0, [width_px, height_px, width_px, height_px])
    sides_px = boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]
    kept = finite & (sides_px > 0).all(axis=1)
    boxes_xywh_px = np.concatenate([boxes_xyxy_px[:, :2], sides_px], axis=1)
    entries: list[CocoDetection] = [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(
            category_ids[kept].tolist(), boxes_xywh_px[kept].tolist(), scores[kept].tolist(), strict=True
        )
    ]
    num_non_finite = int((~finite).sum())
    return entries, len(kept) - len(entries) - num_non_finite, num_non_finite


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule's own mode again (parts may be frozen in evaluation mode)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training

"""From a detector and a loader to COCO results in original-image pixels, and from stored weights to their score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.augment import fit_hw
from data.loader import Batch
from evaluation.checks import CocoDetection
from evaluation.foreground import ForegroundObserver, ObjectScore
from models.interface import Detections, Detector, PostprocessConfig
from models.postprocess import suppress_non_maxima


class Detected(NamedTuple):
    """COCO results of all images, in loader order and by descending score within an image.

    `counts`: `num_detected_images`, and what was left out: `num_dropped_candidates` (by the cap before non-maximum
    suppression), `num_degenerate_boxes` (no area left inside the image) and `num_non_finite_boxes`. `object_scores`:
    what a `ForegroundObserver` saw, if one was there.
    """

    detections: list[CocoDetection]
    counts: dict[str, int]
    object_scores: Sequence[ObjectScore] = ()


def detect(
    detector: Detector,
    loader: Iterable[Batch],
    config: PostprocessConfig,
    *,
    device: torch.device,
    bf16: bool,
    flip: bool = False,
    observer: ForegroundObserver | None = None,
) -> Detected:
    """Detections of every image of `loader`; the detector's training and evaluation modes are restored afterwards.

    See `detect_batch` for `bf16`, `flip` and `observer`. Boxes are divided by the letterbox scale and clipped to the
    image; `category_id` is label + 1.
    """
    found: list[CocoDetection] = []
    counts = dict.fromkeys(
        ("num_detected_images", "num_dropped_candidates", "num_degenerate_boxes", "num_non_finite_boxes"), 0
    )
    with evaluating(detector):
        for batch in loader:
            for detections, image_id, scale, (height_px, width_px) in zip(
                detect_batch(detector, batch, config, device=device, bf16=bf16, flip=flip, observer=observer),
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
    return Detected(found, counts, () if observer is None else observer.rows)


def detect_batch(
    detector: Detector,
    batch: Batch,
    config: PostprocessConfig,
    *,
    device: torch.device,
    bf16: bool,
    flip: bool = False,
    observer: ForegroundObserver | None = None,
) -> list[Detections]:
    """Detections of each image of a batch, in the network's frame. To be called inside `evaluating`.

    `bf16` runs the forward pass under autocast. `flip` looks at each picture's mirror image as well: what is found
    there is mirrored back, and of both together class-wise suppression keeps at most `max_detections`. `observer` is
    shown the raw predictions for the batch as it is.
    """
    images = batch.images.to(device, non_blocking=True)

    def look(images: Tensor) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return detector(images)

    predictions = look(images)
    if observer is not None:
        observer(predictions, batch)
    found = detector.postprocess(predictions, config)
    if not flip:
        return found
    # The picture alone is mirrored, not the padding: it has to lie at the top left, as in training.
    widths_px = [fit_hw(height, width, images.shape[-1])[1] for height, width in batch.original_hw]
    mirrored = images.clone()
    for image, width_px in zip(mirrored, widths_px, strict=True):
        image[..., :width_px] = image[..., :width_px].flip(-1)
    return [
        _joined(*pair, config)
        for pair in zip(found, detector.postprocess(look(mirrored), config), widths_px, strict=True)
    ]


def _joined(own: Detections, mirrored: Detections, width_px: int, config: PostprocessConfig) -> Detections:
    """What was found on a picture and on its mirror image, together. The picture is `width_px` wide in the input."""
    x1, y1, x2, y2 = mirrored.boxes_xyxy_px.unbind(1)
    boxes_xyxy_px = torch.cat([own.boxes_xyxy_px, torch.stack([width_px - x2, y1, width_px - x1, y2], dim=1)])
    scores, labels = torch.cat([own.scores, mirrored.scores]), torch.cat([own.labels, mirrored.labels])
    order = scores.argsort(descending=True, stable=True)
    boxes_xyxy_px, scores, labels = boxes_xyxy_px[order], scores[order], labels[order]
    kept = suppress_non_maxima(boxes_xyxy_px, labels, config.nms_iou, config.max_detections)
    num_dropped = own.num_dropped_candidates + mirrored.num_dropped_candidates
    return Detections(boxes_xyxy_px[kept], scores[kept], labels[kept], num_dropped)


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
def evaluating(detector: Detector) -> Iterator[None]:
    """Evaluation and inference mode inside; afterwards each submodule's own mode again (parts may be frozen)."""
    module = cast(nn.Module, detector)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training

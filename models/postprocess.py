"""From scored boxes to detections: threshold, candidate cap, exact class-wise non-maximum suppression.

Shapes: A anchor points, N candidates or detections.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .boxes import pairwise_iou
from .interface import Detections, PostprocessConfig

# Large enough to amortise the calls, small enough that a block against the kept boxes stays in cache.
BLOCK = 256


def select_detections(boxes_xyxy_px: Tensor, scores: Tensor, labels: Tensor, config: PostprocessConfig) -> Detections:
    """Return the detections of one image from its boxes (A, 4), scores (A,) and labels (A,).

    Candidates of equal score keep their order.
    """
    candidates = (scores >= config.score_threshold).nonzero().squeeze(1)
    order = scores[candidates].argsort(descending=True, stable=True)[: config.max_candidates]
    num_dropped = len(candidates) - len(order)
    candidates = candidates[order]
    boxes_xyxy_px, scores, labels = boxes_xyxy_px[candidates], scores[candidates], labels[candidates]
    kept = suppress_non_maxima(boxes_xyxy_px, labels, config.nms_iou, config.max_detections)
    return Detections(boxes_xyxy_px[kept], scores[kept], labels[kept], num_dropped)


def suppress_non_maxima(boxes_xyxy_px: Tensor, labels: Tensor, max_iou: float, max_kept: int) -> Tensor:
    """Return the indices (at most `max_kept`) that greedy class-wise suppression keeps, in the given order.

    Boxes (N, 4) and labels (N,) are sorted by descending score. A box falls when its IoU with a kept box of its
    own class exceeds `max_iou`. The result is exact: labels are compared, not encoded in shifted coordinates.
    torchvision, which is faster on a GPU, is used where it is installed, class by class: the result is the same.
    """
    if (nms := torchvision_nms(labels.device.type)) is not None:
        ranks = torch.arange(len(labels), 0, -1, dtype=boxes_xyxy_px.dtype, device=labels.device)
        classes = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
        survivors = [members[nms(boxes_xyxy_px[members], ranks[members], max_iou)] for members in classes]
        return torch.cat([*survivors, labels[:0]]).sort().values[:max_kept]
    kept = torch.zeros(0, dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), BLOCK):
        if len(kept) >= max_kept:
            break
        block = torch.arange(start, min(start + BLOCK, len(labels)), device=labels.device)
        block = block[~_overlaps(boxes_xyxy_px, labels, kept, block, max_iou).any(0)]
        beats = _overlaps(boxes_xyxy_px, labels, block, block, max_iou).triu(1)
        kept = torch.cat((kept, block[_greedy(beats)]))
    return kept[:max_kept]


@functools.cache
def torchvision_nms(device_type: str) -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """Return torchvision's suppression within one class, None where it is absent or not made for torch or device."""
    try:
        nms: Callable[[Tensor, Tensor, float], Tensor] = importlib.import_module("torchvision.ops").nms
        nms(torch.zeros(1, 4, device=device_type), torch.zeros(1, device=device_type), 0.5)
    except (ImportError, RuntimeError, AttributeError):
        return None
    return nms


def _overlaps(boxes_xyxy_px: Tensor, labels: Tensor, first: Tensor, second: Tensor, max_iou: float) -> Tensor:
    same_class = labels[first].unsqueeze(1) == labels[second]
    return same_class & (pairwise_iou(boxes_xyxy_px[first], boxes_xyxy_px[second]) > max_iou)


def _greedy(beats: Tensor) -> Tensor:
    """Return who survives when i, if it survives, removes every j > i with `beats[i, j]`: bool (N,).

    Each pass settles at least the next link of every chain, so the fixed point is the greedy solution.
    """
    survives = torch.ones(len(beats), dtype=torch.bool, device=beats.device)
    while True:
        settled = ~(beats & survives.unsqueeze(1)).any(0)
        if torch.equal(settled, survives):
            return survives
        survives = settled

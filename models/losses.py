"""Loss terms as sums; the training loop divides them by counts taken over the whole global batch.

Shapes: B images, A anchor points, C classes, G ground truths, R ignore regions, P positives. A sum over no
positives is zero and stays connected to the graph, so that every parameter gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .assigners import Assignment
from .boxes import aligned_iou, complete_iou, decode_boxes, encode_boxes, points_in_boxes
from .heads import AnchorPredictions, DistributionPredictions
from .interface import Losses, Targets

BOX_WEIGHT = 5.0

# Predicted and true boxes_xyxy_px, each (P, 4), to a loss per pair (P,).
BoxLoss = Callable[[Tensor, Tensor], Tensor]


def squared_iou_loss(boxes_xyxy_px: Tensor, object_boxes_xyxy_px: Tensor) -> Tensor:
    """Return 1 - IoU^2 of each pair (P,), the box loss of YOLOX."""
    return 1 - aligned_iou(boxes_xyxy_px, object_boxes_xyxy_px).square()


def complete_iou_loss(boxes_xyxy_px: Tensor, object_boxes_xyxy_px: Tensor) -> Tensor:
    """Return 1 - CIoU of each pair (P,)."""
    return 1 - complete_iou(boxes_xyxy_px, object_boxes_xyxy_px)


def anchor_losses(
    predictions: AnchorPredictions,
    targets: Targets,
    assignment: Assignment,
    box_loss: BoxLoss = squared_iou_loss,
    *,
    closing: bool = False,
) -> Losses:
    """Return the sums "box", "objectness" and "class", with "l1" when `closing`; every count is P.

    Source: YOLOX (Ge et al. 2021): 5 times the box loss, and cross entropies whose class target is the one-hot
    label scaled by the IoU and whose objectness target is 1 for positives, over all anchors; per positive.

    Differs from the paper: a negative anchor whose centre lies in an ignore region is left out of the objectness
    sum, because whatever stands there is unlabelled; metrics count these anchors.
    """
    at = (assignment.image_index, assignment.anchor_index)
    boxes_raw = predictions.boxes_raw[at]
    grid_xy, strides = predictions.grid_xy[at[1]], predictions.strides[at[1]]
    object_boxes_xyxy_px = targets.boxes_xyxy_px[assignment.object_index]
    boxes_xyxy_px = decode_boxes(boxes_raw, grid_xy, strides)

    foreground, ignored = anchor_labels(predictions, targets, assignment)
    labels = F.one_hot(targets.labels[assignment.object_index], predictions.class_logits.shape[2])
    class_targets = labels * aligned_iou(boxes_xyxy_px.detach(), object_boxes_xyxy_px).unsqueeze(1)

    sums = {
        "box": BOX_WEIGHT * box_loss(boxes_xyxy_px, object_boxes_xyxy_px).sum(),
        "objectness": foreground_loss(predictions.objectness_logits, foreground, ignored),
        "class": F.binary_cross_entropy_with_logits(predictions.class_logits[at], class_targets, reduction="sum"),
    }
    if closing:
        sums["l1"] = F.l1_loss(boxes_raw, encode_boxes(object_boxes_xyxy_px, grid_xy, strides), reduction="sum")
    return Losses(sums, dict.fromkeys(sums, foreground.sum().float()), assignment_metrics(targets, assignment, ignored))


def foreground_loss(logits: Tensor, foreground: Tensor, ignored: Tensor) -> Tensor:
    """Return the sum of cross entropies of logits with bool labels of their shape, without the ignored."""
    return F.binary_cross_entropy_with_logits(
        logits, foreground.to(logits.dtype), weight=(~ignored).to(logits.dtype), reduction="sum"
    )


def anchor_labels(
    predictions: AnchorPredictions | DistributionPredictions, targets: Targets, assignment: Assignment
) -> tuple[Tensor, Tensor]:
    """Return which anchor points are positive, and which are negative in an ignore region: bool (B, A) each."""
    foreground = torch.zeros_like(predictions.class_logits[:, :, 0], dtype=torch.bool)
    foreground[assignment.image_index, assignment.anchor_index] = True
    return foreground, ignored_anchors(predictions, targets) & ~foreground


def ignored_anchors(predictions: AnchorPredictions | DistributionPredictions, targets: Targets) -> Tensor:
    """Return which anchor points have their centre in an ignore region of their image: bool (B, A)."""
    regions = torch.zeros_like(predictions.class_logits[:, :, 0])
    inside = points_in_boxes(predictions.anchors_xy_px, targets.ignore_xyxy_px)
    return regions.index_add_(0, targets.ignore_image_index, inside.to(regions.dtype)) > 0


def assignment_metrics(targets: Targets, assignment: Assignment, ignored: Tensor) -> dict[str, Tensor]:
    """Return how many positives an object got, and how many objects and anchors count for nothing."""
    num_positives = torch.bincount(assignment.object_index, minlength=len(targets.labels)).float()
    return {
        "positives_per_object": num_positives.sum() / max(len(num_positives), 1),
        "num_objects_without_positive": (num_positives == 0).sum().float(),
        "num_ignored_anchors": ignored.sum().float(),
    }

"""A detector after YOLOv8 (2023, no paper), written from published facts.

C2f layers, distributions for the sides of a box, a head without objectness, task-aligned assignment.

Shapes: B images, A anchor points over all levels, C classes, P positives, K distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .assigners import TaskAligned
from .backbones import C2fDarknet, check_images, scaled_repeats
from .blocks import without_autocast
from .boxes import boxes_to_distances, distances_to_boxes
from .heads import DistributionHead, DistributionPredictions, mean_distances
from .interface import AnchorScores, Architecture, Detections, Losses, PostprocessConfig, Targets
from .losses import anchor_labels, assignment_metrics, complete_iou_loss
from .necks import C2fPAFPN
from .postprocess import select_detections
from .settings import InvalidSetting
from .yolox import STRIDES, STRIDES_P2, check_multipliers, check_strides

BOX_WEIGHT = 7.5
CLASS_WEIGHT = 0.5
DISTRIBUTION_WEIGHT = 1.5

STAGE_CHANNELS = (64, 128, 256, 512, 1024)
# Depth, width and the widest stage before scaling, of each size.
SIZES = {
    "n": (0.33, 0.25, 1024),
    "s": (0.33, 0.50, 1024),
    "m": (0.67, 0.75, 768),
    "l": (1.0, 1.0, 512),
    "x": (1.0, 1.25, 512),
}


@dataclass(frozen=True)
class Yolov8Config:
    """Depth and width multipliers, the widest stage before scaling, strides of the levels.

    Raises:
        InvalidSetting: a multiplier is not positive and finite, the widest stage has no channels, or the strides are
            no run.
    """

    depth: float
    width: float
    max_channels: int
    strides: tuple[int, ...] = STRIDES

    def __post_init__(self) -> None:
        check_multipliers(self.depth, self.width)
        if self.max_channels < 1:
            raise InvalidSetting(f"max_channels={self.max_channels!r} must be at least 1. Give a positive integer.")
        check_strides(self.strides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the stem and the four stages: multiples of 8."""
        return tuple(8 * math.ceil(min(c, self.max_channels) * self.width / 8) for c in STAGE_CHANNELS)


class Yolov8(nn.Module):
    """A detector of a backbone, a neck, a head that predicts distributions, and task-aligned assignment.

    Images enter as elsewhere, BGR and 0..255: the first batch normalisation makes the scale meaningless, and the order
    of the channels means nothing to weights that are learned.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: DistributionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.assigner = TaskAligned()
        self.num_classes = head.num_classes
        self.strides = head.strides

    def forward(self, images: Tensor) -> DistributionPredictions:
        """Images (B, 3, H, W), BGR, 0..255, to raw predictions.

        Raises:
            ValueError: the shape is not (B, 3, H, W), or H or W is not a multiple of the largest stride.
        """
        check_images(images, max(self.strides))
        predictions: DistributionPredictions = self.head(self.neck(self.backbone(images)))
        return predictions

    def criterion(
        self,
        predictions: DistributionPredictions,
        targets: Targets,
        *,
        closing: bool = False,  # noqa: ARG002 (the contract's; no term begins in the last epochs)
    ) -> Losses:
        """Return the sums "box", "class" and "distribution"; every count is the sum of the scores to be reached.

        Differs from YOLOv8, which multiplies the whole by the batch size: learning rates are given for a loss that
        does not grow with the batch. As elsewhere, a negative anchor in an ignore region is left out.
        """
        with without_autocast(predictions.side_logits.device):
            assignment, scores = self.assigner(predictions, targets)
            at = (assignment.image_index, assignment.anchor_index)
            side_logits, anchors_xy_px = predictions.side_logits[at], predictions.anchors_xy_px[at[1]]
            strides = predictions.strides[at[1]]
            object_boxes_xyxy_px = targets.boxes_xyxy_px[assignment.object_index]
            boxes_xyxy_px = distances_to_boxes(mean_distances(side_logits), anchors_xy_px, strides)
            distances = boxes_to_distances(object_boxes_xyxy_px, anchors_xy_px, strides)

            _, ignored = anchor_labels(predictions, targets, assignment)
            class_targets = torch.zeros_like(predictions.class_logits)
            class_targets[(*at, targets.labels[assignment.object_index])] = scores
            entropies = F.binary_cross_entropy_with_logits(predictions.class_logits, class_targets, reduction="none")
            sums = {
                "box": BOX_WEIGHT * (complete_iou_loss(boxes_xyxy_px, object_boxes_xyxy_px) * scores).sum(),
                "class": CLASS_WEIGHT * (entropies * ~ignored.unsqueeze(2)).sum(),
                "distribution": DISTRIBUTION_WEIGHT * (distribution_loss(side_logits, distances) * scores).sum(),
            }
        return Losses(sums, dict.fromkeys(sums, scores.sum()), assignment_metrics(targets, assignment, ignored))

    @torch.no_grad()
    def postprocess(self, predictions: DistributionPredictions, config: PostprocessConfig) -> list[Detections]:
        """Return one `Detections` per image: score = the probability of the likeliest class."""
        logits, labels = predictions.class_logits.max(dim=2)
        rows = zip(predictions.decoded_boxes_xyxy_px(), logits.sigmoid(), labels, strict=True)
        return [select_detections(*row, config) for row in rows]

    def scored_boxes(self, predictions: DistributionPredictions) -> tuple[Tensor, Tensor]:
        """Return all boxes (B, A, 4) and their scores (B, A, C): the class's probability."""
        return predictions.decoded_boxes_xyxy_px(), predictions.class_logits.sigmoid()

    def anchor_scores(self, predictions: DistributionPredictions) -> AnchorScores:
        """Return the factors of the scores; see `DistributionPredictions.anchor_scores`."""
        return predictions.anchor_scores()


def distribution_loss(side_logits: Tensor, distances: Tensor) -> Tensor:
    """Return the mean loss (P,) of the four sides, from logits (P, 4, K) and true distances (P, 4) in strides.

    The cross entropies with the two whole distances around the true one, each weighted by how near it is; a distance
    beyond the last is taken as just below it.

    Source: Eq. (6), Li et al. 2020, "Generalized focal loss".
    """
    last = side_logits.shape[2] - 1
    distances = distances.clamp(0, last - 0.01)
    lower = distances.long()
    upper_share = distances - lower
    log_p = side_logits.log_softmax(2)
    at_lower = log_p.gather(2, lower.unsqueeze(2)).squeeze(2)
    at_upper = log_p.gather(2, lower.unsqueeze(2) + 1).squeeze(2)
    return -((1 - upper_share) * at_lower + upper_share * at_upper).mean(1)


def build_yolov8(config: Yolov8Config, num_classes: int) -> Yolov8:
    """Return an initialised detector."""
    return around_backbone(C2fDarknet(config.widths, config.depth), config, num_classes)


def around_backbone(backbone: nn.Module, config: Yolov8Config, num_classes: int) -> Yolov8:
    """Return YOLOv8's neck and head around a backbone whose maps have the widths of the config."""
    channels = config.widths[-len(config.strides) :]
    neck = C2fPAFPN(channels, scaled_repeats(3, config.depth))
    return Yolov8(backbone, neck, DistributionHead(channels, config.strides, num_classes))


YOLOV8_SIZES = (
    *(Architecture(f"yolov8-{size}", Yolov8Config(*numbers), build_yolov8) for size, numbers in SIZES.items()),
    *(
        Architecture(f"yolov8-{size}-p2", Yolov8Config(*SIZES[size], strides=STRIDES_P2), build_yolov8)
        for size in "nsm"
    ),
)

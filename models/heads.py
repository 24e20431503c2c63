"""Heads: feature maps of a neck to raw predictions.

Shapes: B images, D tower channels, C classes, A anchor points over all levels; h x w one level's map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ConvBlock, spatial_conv, without_autocast
from .boxes import anchor_centers, anchor_grid, decode_boxes, distances_to_boxes
from .interface import AnchorScores

# Logit of the foreground probability, 0.01, at which every score starts.
PRIOR_LOGIT = math.log(0.01 / 0.99)


@dataclass(frozen=True)
class AnchorPredictions:
    """Raw float32 predictions, one per anchor point, finest level first.

    `boxes_raw` (B, A, 4) as (tx, ty, tw, th); `objectness_logits` (B, A); `class_logits` (B, A, C);
    `grid_xy` (A, 2) cell corners in cells; `strides` (A,) in pixels.
    """

    boxes_raw: Tensor
    objectness_logits: Tensor
    class_logits: Tensor
    grid_xy: Tensor
    strides: Tensor

    @property
    def anchors_xy_px(self) -> Tensor:
        """Centres of the anchor points (A, 2)."""
        return anchor_centers(self.grid_xy, self.strides)

    def decoded_boxes_xyxy_px(self) -> Tensor:
        """Return the decoded boxes (B, A, 4)."""
        return decode_boxes(self.boxes_raw, self.grid_xy, self.strides)

    def anchor_scores(self) -> AnchorScores:
        """Return the objectness as foreground, and the classes' own probabilities."""
        return AnchorScores(self.anchors_xy_px, self.objectness_logits.sigmoid(), self.class_logits.sigmoid())


@dataclass(frozen=True)
class DistributionPredictions:
    """Raw float32 predictions whose box sides are distributions, one per anchor point, finest level first.

    `side_logits` (B, A, 4, K) over distances of 0..K-1 strides from the anchor point to the left, top, right and
    bottom side; `class_logits` (B, A, C); `grid_xy` (A, 2) cell corners in cells; `strides` (A,) in pixels.
    """

    side_logits: Tensor
    class_logits: Tensor
    grid_xy: Tensor
    strides: Tensor

    @property
    def anchors_xy_px(self) -> Tensor:
        """Centres of the anchor points (A, 2)."""
        return anchor_centers(self.grid_xy, self.strides)

    def decoded_boxes_xyxy_px(self) -> Tensor:
        """Return the decoded boxes (B, A, 4): each side at the mean of its distribution."""
        return distances_to_boxes(mean_distances(self.side_logits), self.anchors_xy_px, self.strides)

    def anchor_scores(self) -> AnchorScores:
        """Return foreground = 1 - prod(1 - p_c) over the classes' probabilities p, and p_c / foreground.

        There is no objectness to ask. The classes are taken for independent, as their loss takes them: foreground is
        the probability of any of them, and never below the largest p_c. The product is p_c, the score. With one class
        foreground is the score, and the class is always 1.
        """
        # As a sum of logarithms, because 1 - p loses what is left of a small p.
        foreground = -torch.expm1(-F.softplus(self.class_logits).sum(2))
        # Where every p_c has run out of float32, 0 / 0.
        divisor = foreground.clamp(min=torch.finfo(foreground.dtype).tiny).unsqueeze(2)
        classes = (self.class_logits.sigmoid() / divisor).clamp(max=1)
        return AnchorScores(self.anchors_xy_px, foreground, classes)


def mean_distances(side_logits: Tensor) -> Tensor:
    """Return the means (..., 4), in strides, of distributions given as logits (..., 4, K)."""
    distances = torch.arange(side_logits.shape[-1], dtype=side_logits.dtype, device=side_logits.device)
    return side_logits.softmax(-1) @ distances


@dataclass(frozen=True)
class TowerFeatures:
    """Outputs of the two towers at one level, each (B, D, h, w)."""

    classification: Tensor
    regression: Tensor


class DecoupledHead(nn.Module):
    """Decoupled head of YOLOX: per level a 1x1 stem, a classification tower and a regression tower of two 3x3 blocks.

    Box and objectness both read the regression tower. The classification and objectness biases start at a
    foreground probability of 0.01.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        hidden_channels: int,
        num_classes: int,
        *,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.hidden_channels = hidden_channels
        self.num_classes = num_classes

        def tower() -> nn.Sequential:
            blocks = (spatial_conv(hidden_channels, hidden_channels, 3, depthwise=depthwise) for _ in range(2))
            return nn.Sequential(*blocks)

        def predictor(out_channels: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(hidden_channels, out_channels, 1) for _ in in_channels)

        self.stems = nn.ModuleList(ConvBlock(channels, hidden_channels, 1) for channels in in_channels)
        self.class_towers = nn.ModuleList(tower() for _ in in_channels)
        self.box_towers = nn.ModuleList(tower() for _ in in_channels)
        self.class_predictors = predictor(num_classes)
        self.box_predictors = predictor(4)
        self.objectness_predictors = predictor(1)
        for conv in (*self.class_predictors, *self.objectness_predictors):
            nn.init.constant_(conv.bias, PRIOR_LOGIT)

    def towers(self, features: Sequence[Tensor]) -> list[TowerFeatures]:
        """Return the tower outputs of each level."""
        levels = zip(self.stems, self.class_towers, self.box_towers, features, strict=True)
        stems = ((stem(x), class_tower, box_tower) for stem, class_tower, box_tower, x in levels)
        return [TowerFeatures(class_tower(x), box_tower(x)) for x, class_tower, box_tower in stems]

    def predict(self, towers: Sequence[TowerFeatures]) -> AnchorPredictions:
        """Return the predictions of all levels from their tower outputs."""
        regression = [tower.regression for tower in towers]
        boxes = _per_anchor(self.box_predictors, regression)
        objectness = _per_anchor(self.objectness_predictors, regression).squeeze(2)
        classes = _per_anchor(self.class_predictors, [tower.classification for tower in towers])
        return AnchorPredictions(boxes, objectness, classes, *_grid(regression, self.strides))

    def forward(self, features: Sequence[Tensor]) -> AnchorPredictions:
        """Return the predictions of all levels from one map (B, C, h, w) per level."""
        return self.predict(self.towers(features))


class DistributionHead(nn.Module):
    """Head of YOLOv8: a tower for the distributions of the box sides and one for the classes, no objectness.

    The widths of both towers follow from the finest level's and hold for all levels.
    """

    NUM_DISTANCES = 16

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.num_classes = num_classes
        finest = in_channels[0]
        box_channels = max(16, finest // 4, 4 * self.NUM_DISTANCES)
        class_channels = max(finest, min(num_classes, 100))

        def towers(hidden: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(ConvBlock(channels, hidden, 3), ConvBlock(hidden, hidden, 3)) for channels in in_channels
            )

        self.box_towers = towers(box_channels)
        self.class_towers = towers(class_channels)
        sides = 4 * self.NUM_DISTANCES
        # At first, five objects in an image of 640 px, spread over the cells and classes.
        logits = [math.log(5 / num_classes / (640 / stride) ** 2) for stride in strides]
        self.box_predictors = nn.ModuleList(_predictor(box_channels, sides, 1.0) for _ in in_channels)
        self.class_predictors = nn.ModuleList(_predictor(class_channels, num_classes, logit) for logit in logits)

    def forward(self, features: Sequence[Tensor]) -> DistributionPredictions:
        """Return the predictions of all levels from one map (B, C, h, w) per level."""
        boxes = [tower(x) for tower, x in zip(self.box_towers, features, strict=True)]
        classes = [tower(x) for tower, x in zip(self.class_towers, features, strict=True)]
        side_logits = _per_anchor(self.box_predictors, boxes).unflatten(2, (4, self.NUM_DISTANCES))
        class_logits = _per_anchor(self.class_predictors, classes)
        return DistributionPredictions(side_logits, class_logits, *_grid(boxes, self.strides))


def _predictor(in_channels: int, out_channels: int, bias: float) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 1)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
    return conv


def _per_anchor(predictors: nn.ModuleList, levels: Sequence[Tensor]) -> Tensor:
    """Return float32 (B, A, K): what the 1x1 predictors (K, D) make of the maps (B, D, h, w), level after level.

    They keep the precision of their weights even under autocast: bfloat16 knows a logit near -4.6 only to 1/32, which
    would blur scores, and tiny boxes with them. They run as matrix products, because float32 convolutions on a single
    CPU thread are left to a slow path.
    """
    outputs = []
    with without_autocast(levels[0].device):
        for predictor, level in zip(predictors, levels, strict=True):
            weight, bias = cast(Tensor, predictor.weight), cast(Tensor, predictor.bias)
            per_anchor = level.permute(0, 2, 3, 1).flatten(1, 2)
            outputs.append(F.linear(per_anchor.to(weight.dtype), weight.flatten(1), bias))
    return torch.cat(outputs, dim=1).float()


def _grid(levels: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    return anchor_grid([(level.shape[2], level.shape[3]) for level in levels], strides, levels[0].device)

"""YOLOX (Ge et al. 2021, "YOLOX: Exceeding YOLO series in 2021"): anchor-free, decoupled head, SimOTA.

Shapes: B images, A anchor points over all levels, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .assigners import CandidateMode, SimOTA
from .backbones import CSPDarknet, check_images, scaled_repeats
from .blocks import without_autocast
from .heads import AnchorPredictions, DecoupledHead
from .interface import AnchorScores, Architecture, Detections, Losses, PostprocessConfig, Targets
from .losses import BoxLoss, anchor_losses, squared_iou_loss
from .necks import PAFPN
from .postprocess import select_detections
from .settings import InvalidSetting

# A level at stride 4 is the usual addition for small objects ("P2").
STRIDES = (8, 16, 32)
STRIDES_P2 = (4, 8, 16, 32)
# Depth and width of each size; unlike nano, n is dense.
MULTIPLIERS = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}


@dataclass(frozen=True)
class YoloxConfig:
    """Depth and width multipliers, separable convolutions, strides of the levels, the assigner's candidate rule.

    `candidate_mode="center"` within 1.5 strides is the authors' later rule, made for tiny objects; the paper's own
    is `"box_or_center"` within 2.5.

    Raises:
        InvalidSetting: a number is not positive and finite, the width leaves no channels, or the strides are no run.
    """

    depth: float
    width: float
    depthwise: bool = False
    strides: tuple[int, ...] = STRIDES
    candidate_mode: CandidateMode = "center"
    center_radius: float = 1.5

    def __post_init__(self) -> None:
        check_multipliers(self.depth, self.width)
        check_positive("center_radius", self.center_radius)
        check_strides(self.strides)


def check_multipliers(depth: float, width: float, narrowest: int = 64) -> None:
    """Raise InvalidSetting unless both are positive and finite, and the width is at least 1 / narrowest."""
    check_positive("depth", depth)
    check_positive("width", width)
    if width < 1 / narrowest:
        raise InvalidSetting(
            f"width={width!r} must be at least 1/{narrowest}, or no channel is left. Give a larger one."
        )


def check_strides(strides: tuple[int, ...]) -> None:
    """Raise InvalidSetting unless the strides run from 4 or 8 to 32."""
    if strides not in (STRIDES, STRIDES_P2):
        raise InvalidSetting(
            f"strides={strides!r} must double from 4 or 8 up to 32. Give {list(STRIDES_P2)} or {list(STRIDES)}."
        )


def check_positive(name: str, value: float) -> None:
    """Raise InvalidSetting unless a number is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise InvalidSetting(f"{name}={value!r} must be finite and above 0. Give a positive number.")


class Yolox(nn.Module):
    """A detector of a backbone, a neck, a decoupled head on the neck's coarsest maps, and SimOTA to train it."""

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: DecoupledHead,
        assigner: SimOTA,
        box_loss: BoxLoss = squared_iou_loss,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.assigner = assigner
        self.box_loss = box_loss
        self.num_classes = head.num_classes
        self.strides = head.strides

    def forward(self, images: Tensor) -> AnchorPredictions:
        """Images (B, 3, H, W), BGR, 0..255, to raw predictions; raises as `features`."""
        predictions: AnchorPredictions = self.head(self.features(images))
        return predictions

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what the head reads: one map (B, C, H / stride, W / stride) per level.

        Raises:
            ValueError: the shape is not (B, 3, H, W), or H or W is not a multiple of the largest stride.
        """
        check_images(images, max(self.strides))
        maps: list[Tensor] = self.neck(self.backbone(images))
        return maps[-len(self.strides) :]

    def criterion(self, predictions: AnchorPredictions, targets: Targets, *, closing: bool = False) -> Losses:
        """Return the loss sums of one batch; see `losses.anchor_losses`."""
        with without_autocast(predictions.boxes_raw.device):
            assignment = self.assigner(predictions, targets)
            return anchor_losses(predictions, targets, assignment, self.box_loss, closing=closing)

    @torch.no_grad()
    def postprocess(self, predictions: AnchorPredictions, config: PostprocessConfig) -> list[Detections]:
        """Return one `Detections` per image: score = objectness times the probability of the likeliest class."""
        class_logits, labels = predictions.class_logits.max(dim=2)
        scores = predictions.objectness_logits.sigmoid() * class_logits.sigmoid()
        images = zip(predictions.decoded_boxes_xyxy_px(), scores, labels, strict=True)
        return [select_detections(*image, config) for image in images]

    def scored_boxes(self, predictions: AnchorPredictions) -> tuple[Tensor, Tensor]:
        """Return all boxes (B, A, 4) and their scores (B, A, C): objectness times the class's probability."""
        scores = predictions.objectness_logits.sigmoid().unsqueeze(2) * predictions.class_logits.sigmoid()
        return predictions.decoded_boxes_xyxy_px(), scores

    def anchor_scores(self, predictions: AnchorPredictions) -> AnchorScores:
        """Return the factors of the scores; see `AnchorPredictions.anchor_scores`."""
        return predictions.anchor_scores()


def build_yolox(config: YoloxConfig, num_classes: int) -> Yolox:
    """Return an initialised YOLOX."""
    backbone = CSPDarknet(config.depth, config.width, depthwise=config.depthwise)
    channels = backbone.out_channels[-len(config.strides) :]
    neck = PAFPN(channels, scaled_repeats(3, config.depth), depthwise=config.depthwise)
    head = DecoupledHead(channels, config.strides, int(256 * config.width), num_classes, depthwise=config.depthwise)
    return Yolox(backbone, neck, head, SimOTA(config.candidate_mode, config.center_radius))


YOLOX_SIZES = (
    Architecture("yolox-nano", YoloxConfig(depth=0.33, width=0.25, depthwise=True), build_yolox),
    Architecture("yolox-tiny", YoloxConfig(depth=0.33, width=0.375), build_yolox),
    *(Architecture(f"yolox-{size}", YoloxConfig(*MULTIPLIERS[size]), build_yolox) for size in "smlx"),
    *(
        Architecture(f"yolox-{size}-p2", YoloxConfig(*multipliers, strides=STRIDES_P2), build_yolox)
        for size, multipliers in MULTIPLIERS.items()
    ),
)

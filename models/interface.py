"""The contract between an architecture and everything that trains or scores it.

Shapes: B images, A anchor points, G ground truths, R ignore regions, N detections, C classes.
Frame: all boxes are `xyxy` in pixels of the network's input image, origin at the top left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Ground truth of one batch, the boxes of all images concatenated in image order.

    `boxes_xyxy_px` float32 (G, 4); `labels` int64 (G,) in 0..C-1; `image_index` int64 (G,),
    non-decreasing, in 0..B-1. Ignore regions, where a detection is neither right nor wrong:
    `ignore_xyxy_px` float32 (R, 4) with `ignore_image_index` int64 (R,).
    """

    boxes_xyxy_px: Tensor
    labels: Tensor
    image_index: Tensor
    ignore_xyxy_px: Tensor
    ignore_image_index: Tensor


@dataclass(frozen=True)
class Losses:
    """What a criterion returns: weighted sums, and the counts that turn them into means.

    The training loop adds the counts up over all ranks and divides once, so that the loss does not
    depend on how the global batch is spread. `sums` and `counts` have the same keys; every value is a
    float32 scalar tensor; only `sums` carry gradients. `metrics` are detached scalars, logged as means over workers.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Detections:
    """Detections of one image, by descending score.

    `boxes_xyxy_px` float32 (N, 4); `scores` float32 (N,) in 0..1; `labels` int64 (N,).
    `num_dropped_candidates` counts the candidates above the score threshold that the candidate cap
    left out before non-maximum suppression: 0 unless the image is extremely dense.
    """

    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor
    num_dropped_candidates: int = 0


@dataclass(frozen=True)
class AnchorScores:
    """The two factors of every score, float32 probabilities: a detection's score is their product for its class.

    `centres_xy_px` (A, 2) of the anchor points; `foreground` (B, A): there is an object; `class_given_foreground`
    (B, A, C): it is of this class, if there is one.

    Source: Eq. (1), "Unmasking the Tiny: Foreground Probing for Small Object Detection".
    """

    centres_xy_px: Tensor
    foreground: Tensor
    class_given_foreground: Tensor


@dataclass(frozen=True)
class PostprocessConfig:
    """Thresholds of the step from raw predictions to detections."""

    score_threshold: float = 0.01
    nms_iou: float = 0.65
    max_detections: int = 500
    max_candidates: int = 10_000


class Detector(Protocol):
    """A `torch.nn.Module` with three verbs, forward, criterion and postprocess, and what comes before the last.

    `forward` takes images uint8 or float (B, 3, H, W), BGR, 0..255, H and W multiples of the largest
    stride, and returns raw predictions whose type belongs to the architecture. It may be wrapped in
    DistributedDataParallel; `criterion`, `postprocess`, `scored_boxes` and `anchor_scores` hold no parameters and are
    called on the detector itself.
    """

    num_classes: int
    strides: tuple[int, ...]

    def __call__(self, images: Tensor) -> Any:
        """Raw predictions of a batch."""
        ...

    def criterion(self, predictions: Any, targets: Targets, *, closing: bool = False) -> Losses:
        """Losses of one batch; `closing` is true in the last epochs, which see no mosaic."""
        ...

    def postprocess(self, predictions: Any, config: PostprocessConfig) -> list[Detections]:
        """One `Detections` per image."""
        ...

    def scored_boxes(self, predictions: Any) -> tuple[Tensor, Tensor]:
        """Boxes float32 (B, A, 4) and scores (B, A, C) of all anchor points, before any threshold.

        `postprocess` chooses among them, by the likeliest class of each; an exported network ends here.
        """
        ...

    def anchor_scores(self, predictions: Any) -> AnchorScores:
        """The scores of all anchor points, before any threshold, in the two factors that they are made of."""
        ...


@dataclass(frozen=True)
class Architecture:
    """One row of the `ARCHITECTURES` table.

    `config` is a frozen dataclass of plain values: its fields are the settings that a user may
    override and enter the run key. `build(config, num_classes)` returns an initialised `Detector`
    (an `nn.Module`).
    """

    name: str
    config: Any
    build: Callable[[Any, int], Any]

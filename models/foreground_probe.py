"""Foreground probing ("Unmasking the Tiny: Foreground Probing for Small Object Detection", ICLR 2026 submission).

YOLOX with a level at stride 4; of all its anchor points, or tokens, the K likeliest to be foreground look at each
other, and get a refined foreground score.

Shapes: B images, A anchor points over all levels, K selected tokens, D tower channels, C classes; h x w one level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import without_autocast
from .heads import PRIOR_LOGIT, AnchorPredictions
from .interface import AnchorScores, Architecture, Detections, Losses, PostprocessConfig, Targets
from .losses import anchor_labels, anchor_losses, complete_iou_loss, foreground_loss
from .settings import InvalidSetting
from .yolox import MULTIPLIERS, STRIDES_P2, Yolox, YoloxConfig, build_yolox


@dataclass(frozen=True)
class ForegroundProbeConfig(YoloxConfig):
    """The detector underneath, the number of tokens K, and what the paper's ablations vary.

    `fixed_gate` sets lambda of Eq. (5) instead of learning it: 1 attends by regression features alone, 0 by
    classification features alone. `unselected` tokens keep their initial score, or get 0 and are never detected.

    Raises:
        InvalidSetting: as `YoloxConfig`; fewer than one token, or a gate outside 0..1.
    """

    strides: tuple[int, ...] = STRIDES_P2
    num_tokens: int = 500
    fixed_gate: float | None = None
    unselected: Literal["keep", "zero"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens < 1:
            raise InvalidSetting(f"num_tokens={self.num_tokens!r} must be at least 1. Give a positive integer.")
        if self.fixed_gate is not None and not 0 <= self.fixed_gate <= 1:
            raise InvalidSetting(
                f"fixed_gate={self.fixed_gate!r} must be in 0..1. Give such a number, or null to learn the gate."
            )


@dataclass(frozen=True)
class ForegroundProbePredictions:
    """The predictions of the detector underneath, and the refined scores of some of them.

    `token_index` int64 (B, K): the selected anchor points, ascending; `refined_logits` float32 (B, K);
    `gate` float32 (B,): lambda of Eq. (5).
    """

    initial: AnchorPredictions
    token_index: Tensor
    refined_logits: Tensor
    gate: Tensor

    def refined(self, unselected: Literal["keep", "zero"]) -> AnchorPredictions:
        """Return the initial predictions with the objectness of the selected tokens replaced.

        The paper does not say what becomes of the rest. Kept, an unselected token may outrank a selected one whose
        refined score fell: see the metric "boundary_inversions".
        """
        logits = self.initial.objectness_logits
        if unselected == "zero":
            logits = torch.full_like(logits, -math.inf)
        return replace(self.initial, objectness_logits=logits.scatter(1, self.token_index, self.refined_logits))


def select_tokens(objectness_logits: Tensor, num_tokens: int) -> Tensor:
    """Return the K = min(num_tokens, A) anchor points of highest objectness (B, A) per image: int64 (B, K), ascending.

    Source: STSM, Eq. (2). The selection carries no gradient; the order of its members means nothing.
    """
    count = min(num_tokens, objectness_logits.shape[1])
    return objectness_logits.detach().topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def gather_tokens(levels: Sequence[Tensor], token_index: Tensor) -> Tensor:
    """Return the features (B, K, D) of the selected anchor points from the maps (B, D, h, w) of all levels.

    Every level is asked for every token, and only its own are taken: shapes stay static, and no map is copied.
    """
    tokens: Tensor | None = None
    start = 0
    for level in levels:
        rows = level.permute(0, 2, 3, 1).flatten(0, 2)
        size = level.shape[2] * level.shape[3]
        own = token_index - start
        # Tokens of other levels wrap around instead of all hitting one row, where their gradients would queue up.
        images = torch.arange(level.shape[0], device=level.device).unsqueeze(1)
        row_index = (own.remainder(size) + images * size).flatten()
        found = rows.index_select(0, row_index).unflatten(0, token_index.shape)
        tokens = found if tokens is None else torch.where((own >= 0).unsqueeze(2), found, tokens)
        start += size
    assert tokens is not None
    return tokens


def mixed_attention(
    regression: tuple[Tensor, Tensor], classification: tuple[Tensor, Tensor], values: Tensor, gate: Tensor
) -> Tensor:
    """Return A V (B, K, D), A = gate A_reg + (1 - gate) A_cls, from a query and a key (B, K, D) for each of the two.

    `values` (B, K, D), `gate` (B,). Source: FRM, Eq. (3) and (5). A V is computed as gate A_reg V +
    (1 - gate) A_cls V, which is the same and leaves no K x K matrix in memory.
    """
    query, key = (torch.stack(pair, dim=1) for pair in zip(regression, classification, strict=True))
    attended = F.scaled_dot_product_attention(query, key, values.unsqueeze(1).expand(-1, 2, -1, -1))
    by_regression, by_classification = attended.unbind(1)
    return torch.lerp(by_classification, by_regression, gate.view(-1, 1, 1))


class ForegroundRefinement(nn.Module):
    """Foreground refinement module (FRM): tokens exchange regression features, guided by both kinds of features.

    The paper leaves open, and here is: one attention head, d_k = d_v = D, projections and gate without bias, the
    score's bias at a foreground probability of 0.01. Everything runs in float32, the softmax above all.

    Differs from the paper: (K, 2 D) features leave the attention, not (N, 2 D) as after Eq. (6), because only the K
    selected tokens enter it; and they feed the refined score alone, not "regression prediction layers", because the
    result is said to combine refined scores with the original boxes.
    """

    def __init__(self, channels: int, fixed_gate: float | None) -> None:
        super().__init__()
        self.regression_projection = nn.Linear(channels, 3 * channels, bias=False)
        self.class_projection = nn.Linear(channels, 2 * channels, bias=False)
        self.gate: nn.Linear | float = fixed_gate if fixed_gate is not None else nn.Linear(2 * channels, 1, bias=False)
        self.score = nn.Linear(2 * channels, 1)
        nn.init.constant_(self.score.bias, PRIOR_LOGIT)

    def forward(self, regression: Tensor, classification: Tensor) -> tuple[Tensor, Tensor]:
        """Tower features (B, K, D) of the selected tokens to refined logits float32 (B, K) and gates float32 (B,)."""
        dtype = self.score.weight.dtype
        with without_autocast(regression.device):
            regression, classification = regression.to(dtype), classification.to(dtype)
            query, key, values = self.regression_projection(regression).chunk(3, dim=2)
            class_query, class_key = self.class_projection(classification).chunk(2, dim=2)
            gate = self._gate(regression, classification)
            attended = mixed_attention((query, key), (class_query, class_key), values, gate)
            logits: Tensor = self.score(torch.cat((regression, attended), dim=2)).squeeze(2)  # Eq. (6)
        return logits.float(), gate.float()

    def _gate(self, regression: Tensor, classification: Tensor) -> Tensor:
        """Return lambda (B,), one for each image: Eq. (4)."""
        if isinstance(self.gate, float):
            return regression.new_full((len(regression),), self.gate)
        gate: Tensor = self.gate(torch.cat((regression.mean(1), classification.mean(1)), dim=1))
        return gate.squeeze(1).sigmoid()


class ForegroundProbe(nn.Module):
    """A YOLOX, the selection of its likeliest tokens (STSM), and their refinement (FRM), trained together."""

    def __init__(
        self, base: Yolox, refinement: ForegroundRefinement, num_tokens: int, unselected: Literal["keep", "zero"]
    ) -> None:
        super().__init__()
        self.base = base
        self.refinement = refinement
        self.num_tokens = num_tokens
        self.unselected = unselected
        self.num_classes = base.num_classes
        self.strides = base.strides

    def forward(self, images: Tensor) -> ForegroundProbePredictions:
        """Images (B, 3, H, W), BGR, 0..255, to raw and refined predictions; raises as `Yolox.features`."""
        towers = self.base.head.towers(self.base.features(images))
        initial = self.base.head.predict(towers)
        token_index = select_tokens(initial.objectness_logits, self.num_tokens)
        regression = gather_tokens([tower.regression for tower in towers], token_index)
        classification = gather_tokens([tower.classification for tower in towers], token_index)
        return ForegroundProbePredictions(initial, token_index, *self.refinement(regression, classification))

    def criterion(
        self,
        predictions: ForegroundProbePredictions,
        targets: Targets,
        *,
        closing: bool = False,  # noqa: ARG002 (the contract's; there is no L1 term to add)
    ) -> Losses:
        """Return the sums of `losses.anchor_losses` on the initial scores, and "refined", which counts tokens.

        Source: Eq. (7) with weights of 1 (refined), 5 (box), 1 (class) and 1 (objectness), which the paper does not
        give: those of YOLOX. Eq. (8) with the assigner's positives as labels, as a mean over the tokens of the whole
        batch. There is no L1 term, so `closing` changes nothing.

        Differs from the paper: objectness is trained on all anchors, as in YOLOX, because on positives alone, as
        written, a constant would do; and a token that is negative in an ignore region is left out of the refined
        sum and its count, because whatever stands there is unlabelled.
        """
        initial = predictions.initial
        with without_autocast(initial.boxes_raw.device):
            assignment = self.base.assigner(initial, targets)
            losses = anchor_losses(initial, targets, assignment, complete_iou_loss)
            foreground, ignored = anchor_labels(initial, targets, assignment)
            selected = foreground.gather(1, predictions.token_index), ignored.gather(1, predictions.token_index)
            refined = foreground_loss(predictions.refined_logits, *selected)
        return Losses(
            {**losses.sums, "refined": refined},
            {**losses.counts, "refined": (~selected[1]).sum().float()},
            {**losses.metrics, **_metrics(predictions, foreground)},
        )

    def postprocess(self, predictions: ForegroundProbePredictions, config: PostprocessConfig) -> list[Detections]:
        """Return one `Detections` per image: score = refined objectness times the likeliest class's probability."""
        return self.base.postprocess(predictions.refined(self.unselected), config)

    def scored_boxes(self, predictions: ForegroundProbePredictions) -> tuple[Tensor, Tensor]:
        """Return all boxes (B, A, 4) and their scores (B, A, C): refined objectness times the class's probability."""
        return self.base.scored_boxes(predictions.refined(self.unselected))

    def anchor_scores(self, predictions: ForegroundProbePredictions) -> AnchorScores:
        """Return the factors of the scores; foreground is the refined objectness."""
        return predictions.refined(self.unselected).anchor_scores()


@torch.no_grad()
def _metrics(predictions: ForegroundProbePredictions, foreground: Tensor) -> dict[str, Tensor]:
    """Return "gate": mean lambda; "positive_recall_at_k": share of the positives that were selected, 1 without any;
    "boundary_inversions": share of the selected whose refined score is below the highest unselected initial score.
    """
    num_positives = foreground.sum()
    num_found = foreground.gather(1, predictions.token_index).sum()
    unselected = predictions.initial.objectness_logits.scatter(1, predictions.token_index, -math.inf)
    highest = unselected.amax(dim=1, keepdim=True)
    return {
        "gate": predictions.gate.mean(),
        "positive_recall_at_k": torch.where(num_positives > 0, num_found / num_positives.clamp(min=1), 1.0),
        "boundary_inversions": (predictions.refined_logits < highest).float().mean(),
    }


def build_foreground_probe(config: ForegroundProbeConfig, num_classes: int) -> ForegroundProbe:
    """Return an initialised detector."""
    base = build_yolox(config, num_classes)
    refinement = ForegroundRefinement(base.head.hidden_channels, config.fixed_gate)
    return ForegroundProbe(base, refinement, config.num_tokens, config.unselected)


FOREGROUND_PROBE_SIZES = tuple(
    Architecture(f"foreground-probe-{size}", ForegroundProbeConfig(*multipliers), build_foreground_probe)
    for size, multipliers in MULTIPLIERS.items()
)

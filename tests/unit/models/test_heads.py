"""Heads: what their predictors make of the towers' maps, and in which order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.boxes import anchor_grid
from models.heads import DecoupledHead, DistributionHead, DistributionPredictions

CHANNELS, STRIDES, NUM_CLASSES = (16, 32), (8, 16), 3


def position_by_position(predictor: nn.Module, feature: Tensor) -> Tensor:
    """(B, h*w, K): the weights times each position's channels, row by row, one at a time."""
    weight, bias = predictor.weight.double().flatten(1), predictor.bias.double()
    batch, _, height, width = feature.shape
    return torch.stack(
        [
            torch.stack([weight @ feature[b, :, y, x].double() + bias for y in range(height) for x in range(width)])
            for b in range(batch)
        ]
    )


def decoupled() -> tuple[DecoupledHead, dict[str, tuple[nn.ModuleList, list[nn.Module]]]]:
    head = DecoupledHead(CHANNELS, STRIDES, 16, NUM_CLASSES)
    regression = [nn.Sequential(*pair) for pair in zip(head.stems, head.box_towers, strict=True)]
    classes = [nn.Sequential(*pair) for pair in zip(head.stems, head.class_towers, strict=True)]
    return head, {
        "boxes_raw": (head.box_predictors, regression),
        "objectness_logits": (head.objectness_predictors, regression),
        "class_logits": (head.class_predictors, classes),
    }


def distribution() -> tuple[DistributionHead, dict[str, tuple[nn.ModuleList, list[nn.Module]]]]:
    head = DistributionHead(CHANNELS, STRIDES, NUM_CLASSES)
    return head, {
        "side_logits": (head.box_predictors, list(head.box_towers)),
        "class_logits": (head.class_predictors, list(head.class_towers)),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [decoupled, distribution])
def test_every_prediction_is_its_predictor_at_its_position(make: Any, autocast: bool) -> None:
    """Under autocast too the predictors compute in float32, on what the towers say in bfloat16."""
    torch.manual_seed(0)
    head, parts = make()
    features = [torch.randn(2, c, 24 // s * 2, 48 // s) for c, s in zip(CHANNELS, STRIDES, strict=True)]
    for predictor in (p for predictors, _ in parts.values() for p in predictors):
        nn.init.normal_(predictor.weight)
    head.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predictions = head(features)
        maps = {
            name: [tower(x) for tower, x in zip(towers, features, strict=True)] for name, (_, towers) in parts.items()
        }
    for name, (predictors, _) in parts.items():
        got = getattr(predictions, name)
        assert got.dtype == torch.float32
        expected = torch.cat([position_by_position(p, x) for p, x in zip(predictors, maps[name], strict=True)], dim=1)
        torch.testing.assert_close(got.double(), expected.reshape(got.shape), rtol=1e-5, atol=1e-5)


def distributions(class_logits: list[list[float]]) -> DistributionPredictions:
    """Predictions (1, A, C) of anchor points in one row."""
    logits = torch.tensor([class_logits])
    grid = anchor_grid([(1, logits.shape[1])], [8], torch.device("cpu"))
    return DistributionPredictions(torch.zeros(1, logits.shape[1], 4, 16), logits, *grid)


@given(st.lists(st.lists(st.floats(-80, 40, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_without_objectness_foreground_is_the_chance_of_any_class(logits: list[list[float]]) -> None:
    scores = distributions(logits).anchor_scores()
    # In float64, where 1 - p keeps its digits down to p = e-30; below, the sum of the p is the chance of any.
    p = 1 / (1 + np.exp(-np.array(logits)))
    anything = np.where(p.max(1) > 1e-8, 1 - np.prod(1 - p, axis=1), p.sum(1))
    np.testing.assert_allclose(scores.foreground[0], anything, rtol=2e-6)
    np.testing.assert_allclose(scores.class_given_foreground[0], p / anything[:, None], rtol=3e-6)
    assert (scores.class_given_foreground <= 1).all()
    np.testing.assert_allclose(scores.foreground[0][:, None] * scores.class_given_foreground[0], p, rtol=1e-6)


def test_scores_that_run_out_of_float32_are_zero_or_one() -> None:
    scores = distributions([[-300.0, -300.0, -300.0], [300.0, 300.0, -300.0]]).anchor_scores()
    assert scores.foreground.tolist() == [[0, 1]]
    assert scores.class_given_foreground.tolist() == [[[0, 0, 0], [1, 1, 0]]]


def test_of_one_class_foreground_is_the_score() -> None:
    scores = distributions([[-3.0], [0.0], [5.0]]).anchor_scores()
    torch.testing.assert_close(scores.foreground, torch.tensor([[-3.0, 0, 5]]).sigmoid())
    torch.testing.assert_close(scores.class_given_foreground, torch.ones(1, 3, 1))

"""Heads: what their predictors make of the towers' maps, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.heads import DecoupledHead, DistributionHead

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

"""The detector around the refinement: which tokens are selected, what becomes of their scores, losses, settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
from models.assigners import Assignment
from models.boxes import anchor_grid
from models.foreground_probe import ForegroundProbePredictions, gather_tokens, select_tokens
from models.heads import AnchorPredictions
from models.interface import PostprocessConfig, Targets
from models.settings import InvalidSetting

NUM_ANCHORS = 16**2 + 8**2 + 4**2 + 2**2  # of a 64 px image
NO_INDEX = torch.zeros(0, dtype=torch.int64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(num_images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def build() -> Callable[..., Any]:
    """Builds detectors that differ in their settings, but not in their weights."""
    torch.manual_seed(0)
    weights = models.build("foreground-probe-n", num_classes=3).state_dict()

    def build(**settings: Any) -> Any:
        detector: Any = models.build("foreground-probe-n", num_classes=3, **settings)
        detector.load_state_dict(weights)
        return detector.eval()

    return build


@pytest.mark.parametrize("num_tokens", [1, 5, 40, 41, 500])
def test_the_selected_are_the_highest_in_ascending_order(num_tokens: int) -> None:
    logits = normal(3, 40, seed=0)
    selected = select_tokens(logits, num_tokens)
    expected = [np.sort(np.argsort(-row, kind="stable")[:num_tokens]).tolist() for row in logits.numpy()]
    assert selected.tolist() == expected


def test_gathered_tokens_come_from_their_own_cell() -> None:
    sizes = [(4, 6), (2, 3), (1, 2)]
    levels = [normal(2, 5, *size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    cells = [(level, row, column) for level, (h, w) in enumerate(sizes) for row in range(h) for column in range(w)]
    token_index = torch.stack([torch.tensor([0, 7, 23, 24, 29, 30, 31]), torch.tensor([1, 2, 3, 25, 26, 27, 31])])
    got = gather_tokens(levels, token_index)
    got.sum().backward()
    chosen = [torch.zeros(2, *size) for size in sizes]
    for image in range(2):
        for slot, index in enumerate(token_index[image].tolist()):
            level, row, column = cells[index]
            assert torch.equal(got[image, slot], levels[level][image, :, row, column])
            chosen[level][image, row, column] = 1
    for level, mask in zip(levels, chosen, strict=True):
        assert torch.equal(level.grad, mask.unsqueeze(1).expand(-1, 5, -1, -1))


def test_forward_refines_the_tower_features_of_the_likeliest_anchors(build: Callable[..., Any]) -> None:
    detector = build(num_tokens=30)
    with torch.no_grad():
        predictions = detector(images(2))
        alone = detector.base(images(2))
        towers = detector.base.head.towers(detector.base.features(images(2)))
        rows = [
            torch.cat([getattr(tower, name).flatten(2).transpose(1, 2) for tower in towers], dim=1)
            for name in ("regression", "classification")
        ]
        logits, gate = detector.refinement(
            *(torch.stack([x[b][predictions.token_index[b]] for b in range(2)]) for x in rows)
        )
    for name, value in vars(alone).items():
        assert torch.equal(getattr(predictions.initial, name), value), name
    assert torch.equal(predictions.token_index, alone.objectness_logits.topk(30).indices.sort().values)
    assert predictions.refined_logits.shape == (2, 30)
    torch.testing.assert_close(predictions.refined_logits, logits)
    torch.testing.assert_close(predictions.gate, gate)


def test_as_many_tokens_as_anchors_select_all_of_them(build: Callable[..., Any]) -> None:
    for num_tokens in (NUM_ANCHORS, NUM_ANCHORS + 1):
        with torch.no_grad():
            predictions = build(num_tokens=num_tokens)(images(1))
        assert predictions.token_index.tolist() == [list(range(NUM_ANCHORS))]


def test_only_the_selected_scores_are_replaced(build: Callable[..., Any]) -> None:
    with torch.no_grad():
        predictions = build(num_tokens=20)(images(2))
    selected = torch.zeros(2, NUM_ANCHORS, dtype=torch.bool)
    for image in range(2):
        selected[image, predictions.token_index[image]] = True
    keep, zero = predictions.refined("keep"), predictions.refined("zero")
    for refined in (keep, zero):
        assert torch.equal(refined.boxes_raw, predictions.initial.boxes_raw)
        assert torch.equal(refined.class_logits, predictions.initial.class_logits)
        assert torch.equal(refined.objectness_logits[selected].view(2, 20), predictions.refined_logits)
    assert torch.equal(keep.objectness_logits[~selected], predictions.initial.objectness_logits[~selected])
    assert (zero.objectness_logits[~selected].sigmoid() == 0).all()
    assert (keep.objectness_logits != predictions.initial.objectness_logits).sum() == 40


def test_an_image_does_not_see_the_others_of_its_batch(build: Callable[..., Any]) -> None:
    detector, batch = build(num_tokens=50), images(3)
    with torch.no_grad():
        together, alone = detector(batch), detector(batch[1:2])
        batch[0], batch[2] = 255, 0
        other = detector(batch)
    for name in ("token_index", "refined_logits", "gate"):
        assert torch.equal(getattr(other, name)[1], getattr(together, name)[1]), name
        torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[1], rtol=1e-4, atol=1e-5)


def test_the_refined_loss_reaches_both_towers(build: Callable[..., Any]) -> None:
    detector = build(num_tokens=20)
    detector(images(1)).refined_logits.sum().backward()
    for towers in (detector.base.head.class_towers, detector.base.head.box_towers):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in towers.parameters())
    predictors = (*detector.base.head.objectness_predictors, *detector.base.head.class_predictors)
    assert all(conv.weight.grad is None for conv in predictors)


def eight_anchors() -> tuple[ForegroundProbePredictions, Targets]:
    """A row of eight cells at stride 8, each predicting itself; initial logits 0..7, the upper four selected.

    One object covers cell 5 and one, mostly, cell 1; cells 6 and 0 lie in ignore regions.
    """
    grid_xy, strides = anchor_grid([(1, 8)], (8,), torch.device("cpu"))
    boxes_raw = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 8, 4).clone()
    initial = AnchorPredictions(boxes_raw, torch.arange(8.0).unsqueeze(0), torch.zeros(1, 8, 2), grid_xy, strides)
    predictions = ForegroundProbePredictions(
        initial, torch.tensor([[4, 5, 6, 7]]), torch.tensor([[2.0, 1.0, 5.0, -1.0]]), torch.tensor([0.25])
    )
    targets = Targets(
        torch.tensor([[40.0, 0.0, 48.0, 8.0], [8.0, 0.0, 16.0, 7.0]]),
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        torch.tensor([[48.0, 0.0, 56.0, 8.0], [0.0, 0.0, 8.0, 8.0]]),
        torch.tensor([0, 0]),
    )
    return predictions, targets


@pytest.fixture
def detector(build: Callable[..., Any]) -> Any:
    """Assigns anchor 5 to the first object and anchor 1 to the second."""
    detector = build()
    index = torch.tensor([0, 0]), torch.tensor([1, 5]), torch.tensor([1, 0])
    detector.base.assigner = lambda *_: Assignment(*index)
    return detector


@pytest.mark.parametrize("closing", [False, True])
def test_the_refined_loss_is_the_cross_entropy_over_labelled_tokens(detector: Any, closing: bool) -> None:
    predictions, targets = eight_anchors()
    losses = detector.criterion(predictions, targets, closing=closing)
    # Token 6 stands in an ignore region; 4 and 7 are background, 5 is foreground.
    expected = math.log1p(math.exp(2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(-1))
    assert losses.sums["refined"].item() == pytest.approx(expected)
    assert losses.counts["refined"].item() == 3
    assert losses.sums.keys() == {"box", "objectness", "class", "refined"}
    # The objectness of all anchors but the two ignored, before refinement; CIoU of equal boxes is 1.
    objectness = (
        sum(math.log1p(math.exp(x)) for x in (2, 3, 4, 7)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(-5))
    )
    assert losses.sums["objectness"].item() == pytest.approx(objectness)
    angle = 4 / math.pi**2 * (math.atan(8 / 7) - math.pi / 4) ** 2
    complete = 7 / 8 - 0.5**2 / 128 - angle**2 / (1 / 8 + angle)
    assert losses.sums["box"].item() == pytest.approx(5 * (1 - complete), rel=1e-5)
    assert {losses.counts[term].item() for term in ("box", "objectness", "class")} == {2.0}


def test_metrics_in_closed_form(detector: Any) -> None:
    metrics = detector.criterion(*eight_anchors()).metrics
    assert metrics["gate"].item() == 0.25
    # Of the positives 1 and 5, the latter is selected; of the refined scores, three are below anchor 3's.
    assert metrics["positive_recall_at_k"].item() == 0.5
    assert metrics["boundary_inversions"].item() == 0.75
    assert metrics["positives_per_object"].item() == 1.0


def test_with_every_token_selected_none_is_inverted_and_without_positives_none_is_missed(
    build: Callable[..., Any],
) -> None:
    predictions, _ = eight_anchors()
    everything = replace(predictions, token_index=torch.arange(8).unsqueeze(0), refined_logits=torch.zeros(1, 8) - 9)
    empty = Targets(torch.zeros(0, 4), NO_INDEX, NO_INDEX, torch.zeros(0, 4), NO_INDEX)
    metrics = build().criterion(everything, empty).metrics
    assert metrics["boundary_inversions"].item() == 0.0
    assert metrics["positive_recall_at_k"].item() == 1.0


def test_one_set_of_weights_serves_every_number_of_tokens(build: Callable[..., Any]) -> None:
    """What makes a sweep over K free at inference: recall of positives grows with K, up to all of them."""
    targets = Targets(
        torch.tensor([[4.0, 4.0, 12.0, 14.0], [30.0, 20.0, 62.0, 60.0]]),
        torch.tensor([0, 2]),
        torch.tensor([0, 1]),
        torch.zeros(0, 4),
        NO_INDEX,
    )
    recalls = []
    for num_tokens in (1, 20, 100, 200, NUM_ANCHORS):
        detector = build(num_tokens=num_tokens)
        metrics = detector.criterion(detector(images(2)), targets).metrics
        recalls.append(metrics["positive_recall_at_k"].item())
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == 1.0


@pytest.mark.parametrize(("unselected", "count"), [("keep", 8), ("zero", 4)])
def test_a_score_is_refined_objectness_times_the_likeliest_class(
    build: Callable[..., Any], unselected: str, count: int
) -> None:
    predictions, _ = eight_anchors()
    (detections,) = build(unselected=unselected).postprocess(predictions, PostprocessConfig())
    logits = [2.0, 1.0, 5.0, -1.0] + [0.0, 1.0, 2.0, 3.0] * (unselected == "keep")
    expected = sorted((0.5 / (1 + math.exp(-x)) for x in logits), reverse=True)
    assert detections.scores.tolist() == pytest.approx(expected)
    assert len(detections.scores) == count
    scores = build(unselected=unselected).anchor_scores(predictions)
    foreground = [2 * score for score in expected] + [0.0] * (8 - count)
    assert sorted(scores.foreground[0].tolist(), reverse=True) == pytest.approx(foreground)
    assert scores.class_given_foreground.max(2).values.tolist() == [pytest.approx([0.5] * 8)]


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", "nsmlx")
def test_refinement_adds_its_own_parameters_to_the_detector_underneath(size: str) -> None:
    with torch.device("meta"):
        probe = models.build(f"foreground-probe-{size}", num_classes=10)
        fixed = models.build(f"foreground-probe-{size}", num_classes=10, fixed_gate=0.5)
        base = models.build(f"yolox-{size}-p2", num_classes=10)
    channels = {"n": 64, "s": 128, "m": 192, "l": 256, "x": 320}[size]
    # Five projections, the gate, and the score with its bias, on twice the channels each.
    added = 5 * channels**2 + 2 * channels + 2 * channels + 1
    assert num_parameters(probe) - num_parameters(base) == num_parameters(probe.refinement) == added
    assert num_parameters(fixed) == num_parameters(probe) - 2 * channels
    assert added == {"x": 513_281}.get(size, added)


def test_weights_of_the_detector_underneath_fit_its_own_architecture(build: Callable[..., Any]) -> None:
    yolox = models.build("yolox-n-p2", num_classes=3).eval()
    probe = build()
    yolox.load_state_dict(probe.base.state_dict())
    with torch.no_grad():
        assert torch.equal(yolox(images(1)).class_logits, probe(images(1)).initial.class_logits)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ({"num_tokens": 2.0}, "num_tokens=2.0 must be of type int, not float"),
        ({"fixed_gate": 1.5}, r"fixed_gate=1.5 must be in 0\.\.1"),
        ({"fixed_gate": float("nan")}, r"fixed_gate=nan must be in 0\.\.1"),
        ({"fixed_gate": "learned"}, "must be of type float, not str"),
        ({"unselected": "drop"}, r"must be one of \['keep', 'zero'\]"),
        ({"depth": -1.0}, "must be finite and above 0"),
        ({"strides": [8, 32]}, "must double from 4 or 8 up to 32"),
    ],
)
def test_a_wrong_setting_names_its_rule(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(InvalidSetting, match=rule):
        models.configure("foreground-probe-n", **settings)


def test_settings_reach_the_detector() -> None:
    with torch.device("meta"):
        detector = models.build(
            "foreground-probe-n", num_classes=2, num_tokens=7, fixed_gate=1, unselected="zero", strides=[8, 16, 32]
        )
        predictions = detector(torch.empty(2, 3, 64, 64))
    assert (detector.unselected, detector.strides) == ("zero", (8, 16, 32))
    assert predictions.token_index.shape == (2, 7)
    assert detector.refinement.gate == 1.0
    assert models.configure("foreground-probe-n").fixed_gate is None
    assert models.configure("foreground-probe-n", fixed_gate=0.5) != models.configure("foreground-probe-n")

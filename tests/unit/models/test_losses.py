from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.assigners import Assignment
from models.boxes import anchor_grid
from models.heads import AnchorPredictions
from models.interface import Targets
from models.losses import anchor_losses, complete_iou_loss

NO_INDEX = torch.zeros(0, dtype=torch.int64)
NO_BOXES = torch.zeros(0, 4)


def predictions(num_images: int = 1, num_classes: int = 2) -> AnchorPredictions:
    """Stride 8, a grid of 4 x 4; every box is its own cell, every logit 0."""
    grid_xy, strides = anchor_grid([(4, 4)], (8,), torch.device("cpu"))
    boxes_raw = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(num_images, 16, 4).clone()
    return AnchorPredictions(
        boxes_raw.requires_grad_(),
        torch.zeros(num_images, 16, requires_grad=True),
        torch.zeros(num_images, 16, num_classes, requires_grad=True),
        grid_xy,
        strides,
    )


def one_object(label: int = 1) -> tuple[Targets, Assignment]:
    """A 4 x 8 box in the left half of cell 5, which answers for it: IoU one half."""
    box = torch.tensor([[8.0, 8.0, 12.0, 16.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    targets = Targets(box, torch.tensor([label]), zero, NO_BOXES, NO_INDEX)
    return targets, Assignment(zero, torch.tensor([5]), zero)


def test_the_terms_of_one_positive_in_closed_form() -> None:
    targets, assignment = one_object()
    losses = anchor_losses(predictions(), targets, assignment, closing=True)
    sums = {name: value.item() for name, value in losses.sums.items()}
    # Class: log 2 for each of two classes, whatever the target, at logit 0. L1: offset .25 strides, log 2 in width.
    expected = {
        "box": 5 * (1 - 0.25),
        "objectness": 16 * math.log(2),
        "class": 2 * math.log(2),
        "l1": 0.25 + math.log(2),
    }
    assert sums == pytest.approx(expected)
    assert {name: count.item() for name, count in losses.counts.items()} == dict.fromkeys(expected, 1.0)
    assert losses.metrics["positives_per_object"].item() == 1.0


def test_the_box_loss_is_a_parameter_and_the_class_target_stays_the_plain_overlap() -> None:
    targets, assignment = one_object()
    pred, other = predictions(), predictions()
    losses = anchor_losses(pred, targets, assignment, complete_iou_loss)
    # Centres 2 apart, the smallest box around both is the cell; the shapes 8 x 8 and 4 x 8.
    shape = 4 / math.pi**2 * (math.pi / 4 - math.atan(1 / 2)) ** 2
    complete_iou = 1 / 2 - 2**2 / (2 * 8**2) - shape**2 / (1 / 2 + shape)
    assert losses.sums["box"].item() == pytest.approx(5 * (1 - complete_iou))
    losses.sums["class"].backward()
    anchor_losses(other, targets, assignment).sums["class"].backward()
    assert torch.equal(pred.class_logits.grad, other.class_logits.grad)


def test_the_gradient_of_the_class_term_is_probability_minus_iou_at_the_label() -> None:
    pred = predictions()
    with torch.no_grad():
        pred.class_logits.fill_(math.log(3))
    targets, assignment = one_object(label=1)
    anchor_losses(pred, targets, assignment).sums["class"].backward()
    expected = torch.zeros(1, 16, 2)
    expected[0, 5] = torch.tensor([0.75 - 0.0, 0.75 - 0.5])
    torch.testing.assert_close(pred.class_logits.grad, expected)
    # The overlap in the target is a constant: a box is not made worse to ease the class.
    assert pred.boxes_raw.grad is None


def test_the_gradient_of_the_objectness_term_is_probability_minus_foreground() -> None:
    pred = predictions()
    anchor_losses(pred, *one_object()).sums["objectness"].backward()
    expected = torch.full((1, 16), 0.5)
    expected[0, 5] = -0.5
    torch.testing.assert_close(pred.objectness_logits.grad, expected)


def test_l1_only_when_closing() -> None:
    assert set(anchor_losses(predictions(), *one_object()).sums) == {"box", "objectness", "class"}


def test_negatives_in_an_ignore_region_leave_the_objectness_sum_and_positives_stay() -> None:
    pred = predictions(num_images=2)
    targets, assignment = one_object()
    # In image 0: the centres of cells 4, 5, 6 (one of them positive); in image 1 the whole last row. They overlap.
    regions = torch.tensor([[0.0, 8.0, 24.0, 16.0], [0.0, 10.0, 10.0, 14.0], [0.0, 24.0, 32.0, 32.0]])
    targets = replace(targets, ignore_xyxy_px=regions, ignore_image_index=torch.tensor([0, 0, 1]))
    losses = anchor_losses(pred, targets, assignment)
    losses.sums["objectness"].backward()
    assert losses.metrics["num_ignored_anchors"].item() == 6
    silent = (pred.objectness_logits.grad == 0).nonzero().tolist()
    assert silent == [[0, 4], [0, 6], [1, 12], [1, 13], [1, 14], [1, 15]]
    assert losses.sums["objectness"].item() == pytest.approx((32 - 6) * math.log(2))


@pytest.mark.parametrize("closing", [False, True])
def test_without_objects_every_sum_reaches_its_predictions(closing: bool) -> None:
    pred = predictions(num_images=2)
    targets = Targets(NO_BOXES, NO_INDEX, NO_INDEX, NO_BOXES, NO_INDEX)
    losses = anchor_losses(pred, targets, Assignment(NO_INDEX, NO_INDEX, NO_INDEX), closing=closing)
    assert {count.item() for count in losses.counts.values()} == {0.0}
    assert losses.sums["box"].item() == losses.sums["class"].item() == 0.0
    sum(losses.sums.values()).backward()
    for tensor in (pred.boxes_raw, pred.objectness_logits, pred.class_logits):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert all(math.isfinite(metric.item()) for metric in losses.metrics.values())


def test_an_object_that_no_anchor_answers_for_is_counted() -> None:
    targets, assignment = one_object()
    two = Targets(
        targets.boxes_xyxy_px.repeat(2, 1), targets.labels.repeat(2), targets.image_index.repeat(2), NO_BOXES, NO_INDEX
    )
    metrics = anchor_losses(predictions(), two, assignment).metrics
    assert metrics["num_objects_without_positive"].item() == 1
    assert metrics["positives_per_object"].item() == 0.5

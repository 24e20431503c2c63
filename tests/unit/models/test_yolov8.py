"""YOLOv8's parts: exact totals, distributions over distances, task-aligned assignment against a literal reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from models.assigners import TaskAligned
from models.boxes import anchor_grid, boxes_to_distances, distances_to_boxes, pairwise_iou
from models.heads import DistributionPredictions, mean_distances
from models.interface import Targets
from models.settings import InvalidSetting
from models.yolov8 import distribution_loss

# The published totals count the sixteen distances, constants here, as weights.
FIXED = 16


@pytest.mark.parametrize(
    ("name", "num_classes", "total", "gflops"),
    [
        ("yolov8-n", 80, 3_157_200, 8.74),
        ("yolov8-s", 80, 11_166_560, 28.60),
        ("yolov8-m", 80, 25_902_640, 78.94),
        ("yolov8-l", 80, 43_691_520, 165.15),
        ("yolov8-x", 80, 68_229_648, 257.80),
        ("yolov8-n-p2", 80, 3_354_144, 17.22),
        ("yolov8-s-p2", 80, 10_884_336, 39.34),
        ("yolov8-m-p2", 80, 25_082_496, 98.42),
        ("yolov8-n", 1, 3_011_043, 8.08),
        ("yolov8-s", 1, 11_135_987, 28.43),
        ("yolov8-m", 1, 25_856_899, 78.68),
    ],
)
def test_totals_are_exact(name: str, num_classes: int, total: int, gflops: float) -> None:
    with torch.device("meta"):
        detector = models.build(name, num_classes=num_classes).eval()
        with FlopCounterMode(display=False) as counter:
            detector(torch.empty(1, 3, 640, 640))
    assert sum(p.numel() for p in detector.parameters()) + FIXED == total
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.001)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"max_channels": 0}, "at least 1"), ({"strides": [8, 16]}, "must double"), ({"width": -1.0}, "above 0")],
)
def test_a_wrong_setting_names_its_rule(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(InvalidSetting, match=rule):
        models.build("yolov8-n", num_classes=1, **settings)


def test_distances_and_boxes_are_inverse() -> None:
    anchors_xy_px, strides = torch.rand(50, 2) * 640, torch.tensor([8.0, 16.0, 32.0]).repeat(17)[:50]
    distances = torch.rand(50, 4) * 15
    boxes_xyxy_px = distances_to_boxes(distances, anchors_xy_px, strides)
    torch.testing.assert_close(
        boxes_to_distances(boxes_xyxy_px, anchors_xy_px, strides), distances, atol=1e-3, rtol=1e-4
    )
    left = anchors_xy_px[:, 0] - boxes_xyxy_px[:, 0]
    torch.testing.assert_close(left, distances[:, 0] * strides, atol=1e-3, rtol=1e-4)


def test_a_certain_distribution_is_its_distance_and_an_undecided_one_is_the_middle() -> None:
    logits = torch.full((1, 4, 16), -100.0)
    for side, distance in enumerate((0, 3, 7, 15)):
        logits[0, side, distance] = 100
    assert mean_distances(logits).tolist() == [[0, 3, 7, 15]]
    torch.testing.assert_close(mean_distances(torch.ones(2, 4, 16)), torch.full((2, 4), 7.5))


def test_the_distribution_loss_is_the_cross_entropy_with_both_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 4, 16, generator=generator)
    distances = torch.rand(40, 4, generator=generator) * 14.9
    expected = torch.zeros(40)
    for row in range(40):
        for side in range(4):
            true = float(distances[row, side])
            target = torch.zeros(16)
            target[int(true)] = 1 - (true - int(true))
            target[int(true) + 1] = true - int(true)
            expected[row] += F.cross_entropy(logits[row, side], target) / 4
    torch.testing.assert_close(distribution_loss(logits, distances), expected)


def test_a_distance_beyond_the_last_is_asked_for_as_the_last() -> None:
    logits = torch.full((1, 4, 16), -20.0)
    logits[:, :, 15] = 20
    assert distribution_loss(logits, torch.full((1, 4), 40.0)).item() < 0.5
    assert torch.isfinite(distribution_loss(logits, torch.full((1, 4), -3.0))).all()


def predictions(size_px: int, num_images: int, num_classes: int, seed: int) -> DistributionPredictions:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(size_px // stride, size_px // stride) for stride in (8, 16, 32)]
    grid_xy, strides = anchor_grid(sizes, (8, 16, 32), torch.device("cpu"))
    shape = (num_images, len(strides))
    sides = torch.randn(*shape, 4, 16, generator=generator, dtype=torch.float64) * 2
    sides[:, :, :, :3] += 3  # mostly boxes of a few cells, as large as the objects
    classes = torch.randn(*shape, num_classes, generator=generator, dtype=torch.float64)
    return DistributionPredictions(sides, classes, grid_xy.double(), strides.double())


def objects(size_px: int, per_image: list[int], seed: int) -> Targets:
    """Some sides lie on anchor points, which are then not inside."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(per_image)
    center = torch.rand(total, 2, generator=generator, dtype=torch.float64) * size_px
    half = (torch.rand(total, 2, generator=generator, dtype=torch.float64) * 60 + 2) / 2
    boxes = torch.cat((center - half, center + half), dim=1)
    on_anchors = torch.rand(total, 4, generator=generator) < 0.3
    boxes = torch.where(on_anchors, (boxes / 4).round() * 4, boxes)
    return Targets(
        boxes,
        torch.randint(0, 3, (total,), generator=generator),
        torch.arange(len(per_image)).repeat_interleave(torch.tensor(per_image)),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )


def reference(
    pred: DistributionPredictions, image: int, boxes: np.ndarray, labels: np.ndarray
) -> dict[int, tuple[int, float]]:
    """Anchor -> (object, score), a loop per object, as described."""
    decoded = pred.decoded_boxes_xyxy_px()[image]
    iou = pairwise_iou(torch.from_numpy(boxes), decoded).numpy()
    probability = 1 / (1 + np.exp(-pred.class_logits[image].numpy()))
    anchors = pred.anchors_xy_px.numpy()
    wanted: dict[int, list[int]] = {}
    alignment = np.zeros_like(iou)
    inside = np.zeros(iou.shape, dtype=bool)
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        inside[row] = True
        for axis, low, high in ((0, x1, x2), (1, y1, y2)):
            middle = (low + high) / 2
            inside[row] &= (anchors[:, axis] > min(low, middle - 4.04)) & (anchors[:, axis] < max(high, middle + 4.04))
        alignment[row] = np.sqrt(probability[:, labels[row]]) * iou[row] ** 6
        order = [a for a in np.argsort(-alignment[row], kind="stable") if inside[row, a]]
        for anchor in order[:10]:
            wanted.setdefault(int(anchor), []).append(row)
    owner = {a: rows[0] if len(rows) == 1 else int((iou * inside)[:, a].argmax()) for a, rows in wanted.items()}
    matches = {}
    for anchor, row in owner.items():
        mine = [a for a, r in owner.items() if r == row]
        best, highest = max(alignment[row, a] for a in mine), max(iou[row, a] for a in mine)
        matches[anchor] = (row, alignment[row, anchor] / best * highest if best > 0 else 0.0)
    return matches


@pytest.mark.parametrize("seed", range(6))
def test_matches_are_those_of_the_literal_reference(seed: int) -> None:
    pred, targets = predictions(160, 3, 3, seed), objects(160, [12, 0, 40], seed)
    assignment, scores = TaskAligned()(pred, targets)
    for image in range(3):
        first = int((targets.image_index < image).sum())
        mine = targets.image_index == image
        expected = reference(pred, image, targets.boxes_xyxy_px[mine].numpy(), targets.labels[mine].numpy())
        here = assignment.image_index == image
        got = {
            int(a): (int(o) - first, float(s))
            for a, o, s in zip(assignment.anchor_index[here], assignment.object_index[here], scores[here], strict=True)
        }
        assert got.keys() == expected.keys()
        assert all(got[a][0] == expected[a][0] for a in got)
        assert all(got[a][1] == pytest.approx(expected[a][1], rel=1e-6, abs=1e-12) for a in got)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (13.0, 14.5), (6.0, 6.0), (29.0, 31.0)])
def test_an_object_of_4_by_4_pixels_gets_a_positive(corner: tuple[float, float]) -> None:
    x, y = corner
    targets = Targets(
        torch.tensor([[x, y, x + 4, y + 4]]),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )
    detector = models.build("yolov8-n", num_classes=2)
    assignment, scores = detector.assigner(detector(torch.zeros(1, 3, 64, 64)), targets)
    assert 1 <= len(assignment.anchor_index) <= 5
    assert scores.max() > 0


def test_the_scores_are_what_the_losses_are_counted_by() -> None:
    torch.manual_seed(0)
    detector = models.build("yolov8-n", num_classes=3)
    pred, targets = detector(torch.rand(2, 3, 96, 96) * 255), objects(96, [4, 3], 0)
    targets = Targets(
        targets.boxes_xyxy_px.float(), targets.labels, targets.image_index, torch.zeros(0, 4), targets.labels[:0]
    )
    losses = detector.criterion(pred, targets)
    assignment, scores = detector.assigner(pred, targets)
    assert all(count == pytest.approx(float(scores.sum())) for count in losses.counts.values())
    assert losses.metrics["num_objects_without_positive"] == 0
    classes = torch.zeros_like(pred.class_logits)
    classes[assignment.image_index, assignment.anchor_index, targets.labels[assignment.object_index]] = scores
    expected = 0.5 * F.binary_cross_entropy_with_logits(pred.class_logits, classes, reduction="sum")
    torch.testing.assert_close(losses.sums["class"], expected)


def test_an_ignore_region_takes_its_background_out_of_the_class_loss() -> None:
    torch.manual_seed(0)
    detector = models.build("yolov8-n", num_classes=1)
    pred = detector(torch.rand(1, 3, 64, 64) * 255)
    none = torch.zeros(0, dtype=torch.int64)

    def class_loss(regions: torch.Tensor) -> tuple[float, float]:
        index = torch.zeros(len(regions), dtype=torch.int64)
        losses = detector.criterion(pred, Targets(torch.zeros(0, 4), none, none, regions, index))
        return float(losses.sums["class"].detach()), float(losses.metrics["num_ignored_anchors"])

    whole, half = class_loss(torch.zeros(0, 4)), class_loss(torch.tensor([[0.0, 0.0, 64.0, 32.0]]))
    assert (whole[1], half[1]) == (0, 84 / 2)
    assert 0 < half[0] < whole[0]


def test_the_first_probabilities_expect_five_objects_per_image() -> None:
    head = models.build("yolov8-n", num_classes=3).head
    for conv, stride in zip(head.class_predictors, (8, 16, 32), strict=True):
        expected = math.log(5 / 3 / (640 / stride) ** 2)
        assert conv.bias.detach().tolist() == pytest.approx([expected] * 3)

"""SimOTA against a literal reference: float64, NumPy, one object at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.assigners import SimOTA, class_cost, dynamic_k, match_cheapest, pairs_inside
from models.boxes import anchor_grid
from models.heads import AnchorPredictions
from models.interface import Targets

PAPER = SimOTA("box_or_center", 2.5)
SMALL_OBJECTS = SimOTA("center", 1.5)


def predictions(size_px: int, num_images: int, num_classes: int, seed: int) -> AnchorPredictions:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(size_px // stride, size_px // stride) for stride in (8, 16, 32)]
    grid_xy, strides = anchor_grid(sizes, (8, 16, 32), torch.device("cpu"))
    shape = (num_images, len(strides))
    return AnchorPredictions(
        torch.randn(*shape, 4, generator=generator, dtype=torch.float64) * 0.7,
        torch.randn(*shape, generator=generator, dtype=torch.float64) * 2,
        torch.randn(*shape, num_classes, generator=generator, dtype=torch.float64) * 2,
        grid_xy.double(),
        strides.double(),
    )


def objects(size_px: int, per_image: list[int], num_classes: int, seed: int, longest_px: float = 40.0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    total = sum(per_image)
    center = torch.rand(total, 2, generator=generator, dtype=torch.float64) * size_px
    half = (torch.rand(total, 2, generator=generator, dtype=torch.float64) * longest_px + 2) / 2
    return Targets(
        torch.cat((center - half, center + half), dim=1),
        torch.randint(0, num_classes, (total,), generator=generator),
        torch.arange(len(per_image)).repeat_interleave(torch.tensor(per_image)),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )


def reference_dynamic_k(cost: np.ndarray, iou: np.ndarray) -> dict[int, int]:
    """Candidate -> object, as published, with a loop per object; the first wins a tie."""
    chosen: dict[int, list[int]] = {}
    for row in range(len(cost)):
        best = np.sort(iou[row])[::-1][:10]
        k = max(int(best.sum()), 1)
        for candidate in np.argsort(cost[row], kind="stable")[:k]:
            chosen.setdefault(int(candidate), []).append(row)
    return {c: rows[0] if len(rows) == 1 else int(cost[:, c].argmin()) for c, rows in chosen.items()}


def reference_matches(
    pred: AnchorPredictions, image: int, boxes: np.ndarray, labels: np.ndarray, assigner: SimOTA
) -> dict[int, int]:
    raw, grid, stride = (x.numpy() for x in (pred.boxes_raw[image], pred.grid_xy, pred.strides))
    centers = (grid + 0.5) * stride[:, None]
    xy, wh = (raw[:, :2] + grid) * stride[:, None], np.exp(raw[:, 2:]) * stride[:, None]
    decoded = np.concatenate((xy - wh / 2, xy + wh / 2), axis=1)

    near, inside = [], []
    for x1, y1, x2, y2 in boxes:
        reach = assigner.center_radius * stride
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        sides = (centers[:, 0] - cx + reach, cx + reach - centers[:, 0], centers[:, 1] - cy + reach)
        near.append(np.min([*sides, cy + reach - centers[:, 1]], axis=0) > 0)
        inside.append((centers[:, 0] > x1) & (centers[:, 0] < x2) & (centers[:, 1] > y1) & (centers[:, 1] < y2))
    if assigner.candidate_mode == "center":
        mask, wanted, penalty = np.any(near, axis=0), np.array(near), 1e6
    else:
        mask, wanted, penalty = np.any(near, axis=0) | np.any(inside, axis=0), np.array(near) & np.array(inside), 1e5
    candidates = np.flatnonzero(mask)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    p = np.sqrt(sigmoid(pred.class_logits[image].numpy()) * sigmoid(pred.objectness_logits[image].numpy())[:, None])
    cost, iou = np.zeros((len(boxes), len(candidates))), np.zeros((len(boxes), len(candidates)))
    for row, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        q = p[candidates]
        onehot = np.eye(q.shape[1])[label]
        entropy = -(onehot * np.log(q) + (1 - onehot) * np.log1p(-q)).sum(axis=1)
        d = decoded[candidates]
        w = (np.minimum(d[:, 2], box[2]) - np.maximum(d[:, 0], box[0])).clip(0)
        h = (np.minimum(d[:, 3], box[3]) - np.maximum(d[:, 1], box[1])).clip(0)
        area = (d[:, 2] - d[:, 0]) * (d[:, 3] - d[:, 1])
        iou[row] = w * h / (area + (box[2] - box[0]) * (box[3] - box[1]) - w * h)
        cost[row] = entropy - 3 * np.log(iou[row] + 1e-8) + penalty * ~wanted[row, candidates]
    return {int(candidates[c]): row for c, row in reference_dynamic_k(cost, iou).items()}


def assert_equals_reference(pred: AnchorPredictions, targets: Targets, assigner: SimOTA) -> None:
    expected = []
    for image in range(len(pred.boxes_raw)):
        mine = (targets.image_index == image).nonzero().flatten()
        if len(mine):
            boxes, labels = targets.boxes_xyxy_px[mine].numpy(), targets.labels[mine].numpy()
            matches = reference_matches(pred, image, boxes, labels, assigner)
            expected += [(image, anchor, int(mine[row])) for anchor, row in sorted(matches.items())]
    got = assigner(pred, targets)
    assert (
        list(zip(*(index.tolist() for index in (got.image_index, got.anchor_index, got.object_index)), strict=True))
        == expected
    )


@pytest.mark.parametrize("assigner", [SMALL_OBJECTS, PAPER], ids=["center", "paper"])
@pytest.mark.parametrize("seed", range(8))
def test_matches_are_those_of_the_literal_reference(seed: int, assigner: SimOTA) -> None:
    num_classes = (1, 3, 10)[seed % 3]
    targets = objects(96, [1 + 3 * seed, 0, 25], num_classes, seed)
    assert_equals_reference(predictions(96, 3, num_classes, seed), targets, assigner)


@pytest.mark.parametrize("assigner", [SMALL_OBJECTS, PAPER], ids=["center", "paper"])
def test_nine_hundred_objects_in_one_image(assigner: SimOTA) -> None:
    targets = objects(320, [900], 10, seed=1, longest_px=12)
    assert_equals_reference(predictions(320, 1, 10, seed=1), targets, assigner)


def test_matches_of_good_predictions() -> None:
    """Predictions that lie on the objects make k large and contested; noise alone rarely does."""
    pred, targets = predictions(96, 1, 3, seed=5), objects(96, [12], 3, seed=5, longest_px=60)
    nearest = torch.cdist(pred.anchors_xy_px, (targets.boxes_xyxy_px[:, :2] + targets.boxes_xyxy_px[:, 2:]) / 2)
    boxes = targets.boxes_xyxy_px[nearest.argmin(dim=1)]
    stride = pred.strides.unsqueeze(1)
    pred.boxes_raw[0, :, :2] = (
        (boxes[:, :2] + boxes[:, 2:]) / (2 * stride) - pred.grid_xy + pred.boxes_raw[0, :, :2] / 20
    )
    pred.boxes_raw[0, :, 2:] = ((boxes[:, 2:] - boxes[:, :2]) / stride).log() + pred.boxes_raw[0, :, 2:] / 20
    for assigner in (SMALL_OBJECTS, PAPER):
        assert_equals_reference(pred, targets, assigner)
    assert len(PAPER(pred, targets).object_index) > 4 * 12


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_the_anchor_points_strictly_inside(seed: int) -> None:
    """In float32, with sides that lie on anchor points, and boxes partly or wholly outside the image."""
    generator = torch.Generator().manual_seed(seed)
    grid_xy, strides = anchor_grid([(12, 16), (6, 8), (3, 4)], (8, 16, 32), torch.device("cpu"))
    sides = torch.rand(200, 2, 2, generator=generator) * 160 - 16
    sides = torch.where(torch.rand(sides.shape, generator=generator) < 0.5, (sides / 4).round() * 4, sides)
    low, high = sides.amin(1), sides.amax(1)
    centers = ((grid_xy + 0.5) * strides.unsqueeze(1)).unsqueeze(0)
    inside = ((centers > low.unsqueeze(1)) & (centers < high.unsqueeze(1))).all(2)
    objects, anchors = pairs_inside(lambda _: (low, high), grid_xy, strides)
    assert sorted(zip(objects.tolist(), anchors.tolist(), strict=True)) == [tuple(p) for p in inside.nonzero().tolist()]


@pytest.mark.parametrize("seed", range(30))
def test_ties_go_to_the_first_candidate_and_the_first_object(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_objects, num_candidates = int(rng.integers(1, 9)), int(rng.integers(1, 40))
    cost = rng.integers(0, 4, (num_objects, num_candidates)).astype(np.float32)
    iou = rng.integers(0, 5, (num_objects, num_candidates)).astype(np.float32) / 4
    expected = reference_dynamic_k(cost, iou)
    k = torch.from_numpy(np.sort(iou, axis=1)[:, -10:].sum(axis=1)).long().clamp(min=1)
    price = torch.from_numpy(cost)
    # Of some objects all pairs are worth a look first, of others few or none.
    objects, columns = (price < seed % 5).nonzero().unbind(1)
    one_image = [torch.zeros(count, dtype=torch.int64) for count in (num_objects, num_candidates)]
    owner = match_cheapest(lambda rows, where: price[rows, where], k, objects, columns, *one_image, num_images=1)
    assert owner.tolist() == [expected.get(candidate, -1) for candidate in range(num_candidates)]


def test_dynamic_k_sums_the_ten_best_overlaps_within_the_image() -> None:
    ten_by_ten, far = torch.tensor([0.0, 0.0, 10.0, 10.0]), torch.tensor([90.0, 90.0, 99.0, 99.0])
    halves = ten_by_ten * torch.tensor([1.0, 1.0, 1.0, 0.5])
    boxes = torch.stack([ten_by_ten, far, ten_by_ten])
    # The first image has 12 boxes of IoU 1/2 and one that only touches, the second three equal ones and a half.
    candidates = torch.cat([halves.repeat(12, 1), ten_by_ten[None] + 10, ten_by_ten.repeat(3, 1), halves[None]])
    images = torch.tensor([0] * 13 + [1] * 4)
    k = dynamic_k(boxes, torch.tensor([0, 0, 1]), candidates, images, num_images=2)
    assert k.tolist() == [5, 1, 3]


def test_without_objects_everything_is_background() -> None:
    assignment = SMALL_OBJECTS(predictions(64, 2, 3, seed=0), objects(64, [0, 0], 3, seed=0))
    assert len(assignment.image_index) == len(assignment.anchor_index) == len(assignment.object_index) == 0


@pytest.mark.parametrize("assigner", [SMALL_OBJECTS, PAPER], ids=["center", "paper"])
@pytest.mark.parametrize("corner", [(0.0, 0.0), (60.0, 60.0), (30.0, 30.0), (31.9, 8.1)])
def test_an_object_of_4_by_4_pixels_gets_a_positive(corner: tuple[float, float], assigner: SimOTA) -> None:
    x, y = corner
    box = torch.tensor([[x, y, x + 4, y + 4]])
    none = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        box, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4), none
    )
    pred = predictions(64, 1, 1, seed=0)
    # Boxes far larger than the object: nothing overlaps it well.
    pred.boxes_raw[..., 2:] = 2.0
    assert len(assigner(pred, targets).anchor_index) >= 1


def test_class_cost_is_binary_cross_entropy_with_the_one_hot_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator) * 4
    objectness = torch.randn(7, generator=generator) * 4
    logits[0], objectness[0] = 200.0, 200.0
    logits[1] = -200.0
    labels = torch.tensor([4, 0, 0])
    p = (logits.sigmoid() * objectness.sigmoid().unsqueeze(1)).sqrt()
    expected = [
        F.binary_cross_entropy(p, F.one_hot(label, 5).float().expand(7, 5), reduction="none").sum(1) for label in labels
    ]
    got = class_cost(objectness, logits)[:, labels].t()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_an_object_without_any_candidate_is_left_out_quietly() -> None:
    targets = objects(64, [2], 3, seed=0)
    far = Targets(
        targets.boxes_xyxy_px + 1e4,
        targets.labels,
        targets.image_index,
        targets.ignore_xyxy_px,
        targets.ignore_image_index,
    )
    assert len(SMALL_OBJECTS(predictions(64, 1, 3, seed=0), far).anchor_index) == 0


def test_predictions_that_are_not_numbers_do_not_stop_the_assignment() -> None:
    """The loss turns NaN, and the training loop of all ranks decides; an exception would hang the others."""
    pred, targets = predictions(64, 1, 3, seed=0), objects(64, [5], 3, seed=0)
    pred.boxes_raw.fill_(float("nan"))
    pred.class_logits.fill_(float("nan"))
    assignment = SMALL_OBJECTS(pred, targets)
    assert len(set(assignment.anchor_index.tolist())) == len(assignment.anchor_index)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.boxes import (
    aligned_iou,
    anchor_grid,
    complete_iou,
    decode_boxes,
    encode_boxes,
    pairwise_iou,
    points_in_boxes,
)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(count, 2, generator=generator) * 40
    return torch.cat((top_left, top_left + torch.rand(count, 2, generator=generator) * 30), dim=1).double()


def iou_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def test_pairwise_iou_equals_a_loop() -> None:
    a, b = random_boxes(12, 0), random_boxes(9, 1)
    expected = [[iou_by_hand(x, y) for y in b.numpy()] for x in a.numpy()]
    assert np.count_nonzero(expected) > 20
    np.testing.assert_allclose(pairwise_iou(a, b).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(aligned_iou(a[:9], b).numpy(), np.diagonal(expected), rtol=1e-12)


def test_boxes_without_area_share_nothing() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert pairwise_iou(point, point).item() == 0.0


def complete_iou_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    iou = iou_by_hand(a, b)
    distance = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    angles = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return iou - distance / diagonal - v**2 / (1 - iou + v)


def test_complete_iou_equals_a_loop() -> None:
    a, b = random_boxes(60, 0), random_boxes(60, 1)
    expected = [complete_iou_by_hand(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(complete_iou(a, b).numpy(), expected, rtol=1e-9)
    assert min(expected) < -0.3
    assert max(expected) > 0.2


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([2, 3, 10, 7], [2, 3, 10, 7], 1.0),
        # Equal squares side by side: no overlap, centres 4 apart, diagonal^2 = 8^2 + 4^2.
        ([0, 0, 4, 4], [4, 0, 8, 4], -16 / 80),
        # One centre, one shape, half the side: the overlap alone.
        ([0, 0, 8, 8], [2, 2, 6, 6], 0.25),
        # One centre, 4 x 2 in 2 x 4: overlap 4 / 12, shapes differ by atan 2 - atan 1/2.
        ([0, 1, 4, 3], [1, 0, 3, 4], 1 / 3 - (v := 4 / math.pi**2 * math.atan(3 / 4) ** 2) ** 2 / (2 / 3 + v)),
    ],
)
def test_complete_iou_in_closed_form(a: list[float], b: list[float], expected: float) -> None:
    first, second = (torch.tensor([box], dtype=torch.float32) for box in (a, b))
    assert complete_iou(first, second).item() == pytest.approx(expected, abs=1e-6)


def test_the_shape_weight_of_complete_iou_is_a_constant_to_the_gradient() -> None:
    """The gradient is that of the difference quotient with alpha held fixed."""
    a, b = torch.tensor([[0.0, 0.0, 6.0, 4.0]]).double(), torch.tensor([[1.0, 0.5, 5.0, 6.0]]).double()

    def value(box: np.ndarray, alpha: float) -> tuple[float, float]:
        iou, full = iou_by_hand(box, b[0].numpy()), complete_iou_by_hand(box, b[0].numpy())
        angles = [math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (box, b[0].numpy())]
        v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
        return full + v**2 / (1 - iou + v) - alpha * v, v / (1 - iou + v)

    _, alpha = value(a[0].numpy(), 0.0)
    steps = np.eye(4) * 1e-6
    expected = [(value(a[0].numpy() + s, alpha)[0] - value(a[0].numpy() - s, alpha)[0]) / 2e-6 for s in steps]
    complete_iou(a.requires_grad_(), b).sum().backward()
    np.testing.assert_allclose(a.grad[0].numpy(), expected, rtol=1e-6)


def test_complete_iou_of_degenerate_boxes_has_a_finite_gradient() -> None:
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 4.0]])
    others = torch.tensor([[5.0, 5.0, 5.0, 5.0], [7.0, 1.0, 9.0, 4.0], [1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 4.0, 0.0]])
    value = complete_iou(boxes.requires_grad_(), others)
    value.sum().backward()
    assert value.isfinite().all()
    assert (value <= 1).all()
    assert boxes.grad.isfinite().all()


def test_anchor_grid_runs_level_by_level_and_row_by_row() -> None:
    grid_xy, strides = anchor_grid([(2, 3), (1, 2)], (8, 16), torch.device("cpu"))
    assert grid_xy.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 0], [1, 0]]
    assert strides.tolist() == [8.0] * 6 + [16.0] * 2


def test_decode_follows_the_cell_corner() -> None:
    raw = torch.tensor([[0.5, 0.25, 0.0, 0.6931472]])
    box = decode_boxes(raw, torch.tensor([[3.0, 1.0]]), torch.tensor([8.0]))
    # Centre (28, 10), size 8 x 16.
    torch.testing.assert_close(box, torch.tensor([[24.0, 2.0, 32.0, 18.0]]))


def test_encode_is_the_inverse_of_decode() -> None:
    raw = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid_xy = torch.randint(0, 40, (50, 2), generator=torch.Generator().manual_seed(1)).double()
    strides = torch.tensor([8.0, 32.0]).double().repeat(25)
    torch.testing.assert_close(encode_boxes(decode_boxes(raw, grid_xy, strides), grid_xy, strides), raw)


@pytest.mark.parametrize(("point", "inside"), [((5, 5), True), ((0, 5), False), ((5, 10), False), ((11, 5), False)])
def test_points_on_the_border_are_outside(point: tuple[float, float], inside: bool) -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert points_in_boxes(torch.tensor([point], dtype=torch.float32), box).item() is inside

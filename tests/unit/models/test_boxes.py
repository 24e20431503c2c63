from __future__ import annotations

import numpy as np
import pytest
import torch

from models.boxes import aligned_iou, anchor_grid, decode_boxes, encode_boxes, pairwise_iou, points_in_boxes


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

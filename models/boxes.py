"""Box arithmetic. Boxes are `xyxy` in pixels of the network's input image unless a name says otherwise.

Shapes: A anchor points, N and M boxes, `...` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_grid(
    sizes_hw: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the cell corners `grid_xy` (A, 2) in cells and the stride in pixels (A,) of every anchor point.

    Order: levels as given, each row by row. The centre of an anchor point lies at (grid_xy + 0.5) * stride.
    """
    grids, per_anchor = [], []
    for (height, width), stride in zip(sizes_hw, strides, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float32, device=device),
            torch.arange(width, dtype=torch.float32, device=device),
            indexing="ij",
        )
        grids.append(torch.stack((x, y), dim=2).reshape(-1, 2))
        per_anchor.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(grids), torch.cat(per_anchor)


def anchor_centers(grid_xy: Tensor, strides: Tensor) -> Tensor:
    """Return the centres of anchor points (A, 2) in pixels."""
    return (grid_xy + 0.5) * strides.unsqueeze(1)


def decode_boxes(boxes_raw: Tensor, grid_xy: Tensor, strides: Tensor) -> Tensor:
    """Return boxes_xyxy_px (..., 4) from raw (tx, ty, tw, th): centre (t + grid) * stride, size exp(t) * stride."""
    stride = strides.unsqueeze(-1)
    center_px = (boxes_raw[..., :2] + grid_xy) * stride
    half_size_px = boxes_raw[..., 2:].exp() * (stride / 2)
    return torch.cat((center_px - half_size_px, center_px + half_size_px), dim=-1)


def encode_boxes(boxes_xyxy_px: Tensor, grid_xy: Tensor, strides: Tensor) -> Tensor:
    """Return raw (tx, ty, tw, th) (..., 4): the inverse of `decode_boxes`."""
    stride = strides.unsqueeze(-1)
    top_left, bottom_right = boxes_xyxy_px.split(2, dim=-1)
    offset = (top_left + bottom_right) / (2 * stride) - grid_xy
    # A box of no extent has no logarithm; 1e-8 strides is far below any real box.
    log_size = ((bottom_right - top_left) / stride).clamp(min=1e-8).log()
    return torch.cat((offset, log_size), dim=-1)


def areas(boxes_xyxy_px: Tensor) -> Tensor:
    """Return areas in square pixels (...)."""
    x1, y1, x2, y2 = boxes_xyxy_px.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def _iou(a: Sequence[Tensor], b: Sequence[Tensor], area_a: Tensor, area_b: Tensor) -> Tensor:
    width = torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])
    height = torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = area_a + area_b - intersection
    # Two boxes of no area share nothing: 0, not 0/0.
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def pairwise_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Return intersection over union (N, M) of boxes (N, 4) with boxes (M, 4)."""
    a, b = boxes_a.unsqueeze(1), boxes_b.unsqueeze(0)
    return _iou(a.unbind(-1), b.unbind(-1), areas(a), areas(b))


def aligned_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Return intersection over union (N,) of boxes (N, 4) with boxes (N, 4), one by one; differentiable."""
    return _iou(boxes_a.unbind(-1), boxes_b.unbind(-1), areas(boxes_a), areas(boxes_b))


def complete_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Return complete IoU (N,) of boxes (N, 4) with boxes (N, 4), one by one; differentiable, at most 1.

    IoU - d^2 / c^2 - alpha v: d the distance of the centres, c the diagonal of the smallest box around both,
    v = 4 / pi^2 (difference of atan(width / height))^2, and alpha = v / (1 - IoU + v), taken as a constant.

    Source: Zheng et al. 2020, "Distance-IoU loss", Eq. (6)-(11).
    """
    iou = aligned_iou(boxes_a, boxes_b)
    # Below any real box, yet its square is still a float: keeps 0 / 0 out of value and gradient.
    tiny = 1e-9
    around = torch.maximum(boxes_a[:, 2:], boxes_b[:, 2:]) - torch.minimum(boxes_a[:, :2], boxes_b[:, :2])
    offset = (boxes_a[:, :2] + boxes_a[:, 2:] - boxes_b[:, :2] - boxes_b[:, 2:]) / 2
    distance = offset.square().sum(1) / around.square().sum(1).clamp(min=tiny**2)

    angle_a, angle_b = (torch.atan2(*(box[:, 2:] - box[:, :2]).clamp(min=tiny).unbind(1)) for box in (boxes_a, boxes_b))
    shape = (angle_a - angle_b).square() * (4 / math.pi**2)
    weight = (shape / (1 - iou + shape).clamp(min=tiny)).detach()
    return iou - distance - weight * shape


def distances_to_boxes(distances: Tensor, anchors_xy_px: Tensor, strides: Tensor) -> Tensor:
    """Return boxes_xyxy_px (..., 4) from distances (..., 4) in strides: left, top, right, bottom from an anchor."""
    left_top, right_bottom = (distances * strides.unsqueeze(-1)).split(2, dim=-1)
    return torch.cat((anchors_xy_px - left_top, anchors_xy_px + right_bottom), dim=-1)


def boxes_to_distances(boxes_xyxy_px: Tensor, anchors_xy_px: Tensor, strides: Tensor) -> Tensor:
    """Return distances (..., 4) in strides: the inverse of `distances_to_boxes`; negative outside the box."""
    top_left, bottom_right = boxes_xyxy_px.split(2, dim=-1)
    distances_px = torch.cat((anchors_xy_px - top_left, bottom_right - anchors_xy_px), dim=-1)
    return distances_px / strides.unsqueeze(-1)


def points_in_boxes(points_xy_px: Tensor, boxes_xyxy_px: Tensor) -> Tensor:
    """Return whether box i (N, 4) holds point j (M, 2) strictly inside: bool (N, M)."""
    x, y = points_xy_px.unbind(-1)
    x1, y1, x2, y2 = boxes_xyxy_px.unsqueeze(-1).unbind(-2)
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)

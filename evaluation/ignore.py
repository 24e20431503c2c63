"""Ignore regions: which boxes lie, by at least half of their own area, in the union of an image's regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.tables import DetectionTable, TruthTable, rows_by_image

IgnoreRule = Literal["none", "covered-half"]

# Without slack for rounding, a box that is covered by exactly one half could fall either way.
_HALF = 0.5 - 1e-9


def in_ignore_regions(
    table: TruthTable | DetectionTable, regions_xywh_px: Sequence[NDArray[np.float64]], rule: IgnoreRule
) -> NDArray[np.bool_]:
    """True for each annotation or detection that the rule takes out of the score; bool, one a row of the table.

    `regions_xywh_px`: (R, 4) for each image.
    """
    ignored = np.zeros(len(table.image), dtype=bool)
    if rule == "none":
        return ignored
    for rows, regions in zip(rows_by_image(table, len(regions_xywh_px)), regions_xywh_px, strict=True):
        if len(regions):
            ignored[rows] = covered_by_half(table.boxes_xywh_px[rows], regions)
    return ignored


def covered_area_px(boxes_xywh: NDArray[np.float64], regions_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area of each box that the union of the regions covers, float64 (N,), from boxes (N, 4) and regions (R, 4).

    Exact, not rasterised: the regions' edges cut the plane into at most (2R-1)^2 cells, each wholly inside or outside.
    """
    if len(regions_xywh) == 0:
        return np.zeros(len(boxes_xywh))
    regions = np.concatenate([regions_xywh[:, :2], regions_xywh[:, :2] + regions_xywh[:, 2:]], axis=1)
    x_edges, y_edges = np.unique(regions[:, 0::2]), np.unique(regions[:, 1::2])
    spans_x = (regions[:, 0:1] <= x_edges[:-1]) & (x_edges[1:] <= regions[:, 2:3])  # (R, X)
    spans_y = (regions[:, 1:2] <= y_edges[:-1]) & (y_edges[1:] <= regions[:, 3:4])  # (R, Y)
    inside = (spans_x[:, :, None] & spans_y[:, None, :]).any(axis=0)  # (X, Y)
    overlap_x = _overlap(boxes_xywh[:, 0], boxes_xywh[:, 2], x_edges)  # (N, X)
    overlap_y = _overlap(boxes_xywh[:, 1], boxes_xywh[:, 3], y_edges)
    covered: NDArray[np.float64] = ((overlap_x @ inside) * overlap_y).sum(axis=1)
    return covered


def covered_by_half(boxes_xywh: NDArray[np.float64], regions_xywh: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True where at least half of a box's own area lies in the union of the regions; bool (N,)."""
    area_px = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    covered: NDArray[np.bool_] = covered_area_px(boxes_xywh, regions_xywh) >= _HALF * area_px
    return covered


def _overlap(
    start: NDArray[np.float64], length: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Length of each interval (N,) inside each span between two neighbouring edges; (N, len(edges) - 1)."""
    low = np.maximum(start[:, None], edges[:-1])
    high = np.minimum((start + length)[:, None], edges[1:])
    length_px: NDArray[np.float64] = np.maximum(high - low, 0.0)
    return length_px

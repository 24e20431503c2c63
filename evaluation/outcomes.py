"""COCO's rules on columns: what became of each detection, and the precision and recall that follow.

The same numbers as pycocotools, to rounding, many times as fast, and what they are made of: samples of images can be
scored without matching again.

Legend: A areas, T=10 IoU thresholds, C classes, G ground truths, N detections, M limits on detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.matching import NOT_MATCHED, match_greedily, overlapping, ranks
from evaluation.tables import DetectionTable, TruthTable

# As pycocotools writes them: other ways to say the same differ in the last bit.
IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
RECALL_POINTS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)

# Square pixels, both ends included, by name; "all" comes first.
Areas = Mapping[str, tuple[float, float]]


class Outcomes(NamedTuple):
    """What became of each detection within its image's and class's limit, by class and descending score.

    `is_hit` (A, T, N): it took an object of that area; `is_counted` (A, T, N): hit or false positive, not ignored;
    `ranks` (N,): its place within image and class; `is_scored` (A, G): the ground truths to be found.
    """

    truths: TruthTable
    detections: DetectionTable
    ranks: NDArray[np.int64]
    is_hit: NDArray[np.bool_]
    is_counted: NDArray[np.bool_]
    is_scored: NDArray[np.bool_]


class Curves(NamedTuple):
    """`precision` (T, 101, C, A) at `RECALL_POINTS`, `recall` (T, C, A, M) at each limit; -1 without ground truth."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]


def outcomes_of(truths: TruthTable, detections: DetectionTable, areas: Areas, max_dets: int) -> Outcomes:
    """Match by COCO's rules at all thresholds and areas; `max_dets` detections per image and class take part."""
    cells = detections.image * (1 + int(detections.label.max(initial=0))) + detections.label
    place = ranks(detections, cells)
    # Equal scores stay in the order of their images, as in pycocotools.
    order = np.lexsort((place, detections.image, -detections.scores, detections.label))
    order = order[place[order] < max_dets]
    detections, place = detections.take(order), place[order]

    bounds = np.array(list(areas.values()), np.float64)[:, :, None]
    outside, outside_found = (
        (area < bounds[:, 0]) | (area > bounds[:, 1]) for area in (truths.areas_px, detections.areas_px)
    )
    ignored = truths.is_crowd | outside
    pairs = overlapping(truths, detections, float(IOU_THRESHOLDS.min()))
    taken = match_greedily(pairs, len(order), truths.is_crowd, ignored, IOU_THRESHOLDS)
    is_matched = taken != NOT_MATCHED
    views = np.arange(len(areas))[:, None, None]
    on_ignored = is_matched & np.concatenate([ignored, np.zeros((len(areas), 1), bool)], axis=1)[views, taken]
    is_hit = is_matched & ~on_ignored
    is_counted = is_hit | (~is_matched & ~outside_found[:, None])
    return Outcomes(truths, detections, place, is_hit, is_counted, ~ignored)


def curves_of(outcomes: Outcomes, num_classes: int, limits: Sequence[int]) -> Curves:
    """Precision at the last limit and recall at each."""
    num_areas, num_thresholds, _ = outcomes.is_hit.shape
    precision = np.full((num_thresholds, len(RECALL_POINTS), num_classes, num_areas), -1.0)
    recall = np.full((num_thresholds, num_classes, num_areas, len(limits)), -1.0)
    ends = np.searchsorted(outcomes.detections.label, np.arange(num_classes + 1))
    for label in range(num_classes):
        rows = slice(ends[label], ends[label + 1])
        num_truths = outcomes.is_scored[:, outcomes.truths.label == label].sum(axis=1)
        for area in np.flatnonzero(num_truths):
            is_hit, is_counted = outcomes.is_hit[area, :, rows], outcomes.is_counted[area, :, rows]
            for m, limit in enumerate(limits):
                recall[:, label, area, m] = is_hit[:, outcomes.ranks[rows] < limit].sum(axis=1) / num_truths[area]
            for threshold in range(num_thresholds):
                precision[threshold, :, label, area] = _interpolated(
                    is_hit[threshold], is_counted[threshold], num_truths[area]
                )
    return Curves(precision, recall)


def _interpolated(is_hit: NDArray[np.bool_], is_counted: NDArray[np.bool_], num_truths: int) -> NDArray[np.float64]:
    """Highest precision at or beyond each of `RECALL_POINTS`, 0 beyond the last; (101,)."""
    # Between two hits precision only falls: what it is at the hits says it all.
    num_counted = np.cumsum(is_counted)[is_hit]
    num_hits = np.arange(1, len(num_counted) + 1)
    best = np.maximum.accumulate((num_hits / (num_counted + np.spacing(1)))[::-1])[::-1]
    place = np.searchsorted(num_hits / num_truths, RECALL_POINTS, side="left")
    precision: NDArray[np.float64] = np.append(best, 0.0)[place]
    return precision

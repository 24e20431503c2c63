"""Which detection takes which object: greedily by score, as pycocotools and the VisDrone toolkit do, for all images.

Legend: I images, G ground truths, N detections, T IoU thresholds, V views (which ground truths are ignored), P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from evaluation.ignore import IgnoreRule, in_ignore_regions
from evaluation.tables import DetectionTable, TruthTable, tabulate

NOT_MATCHED = -1


class Pairs(NamedTuple):
    """Detections and ground truths of one image that overlap: rows (P,) of both tables and their IoU (P,).

    With a crowd box it is the intersection over the detection's area. Sorted by image, by rank of the detection (equal
    scores keep their order), then by IoU and row of the ground truth, all ascending.
    """

    detection: NDArray[np.int64]
    truth: NDArray[np.int64]
    iou: NDArray[np.float64]


def ranks(detections: DetectionTable, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each detection by descending score within its group, from 0; equal scores keep their order. (N,)."""
    order = np.lexsort((-detections.scores, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
    return place


def overlapping(
    truths: TruthTable, detections: DetectionTable, min_iou: float, *, across_classes: bool = False
) -> Pairs:
    """Pairs of one image, and unless `across_classes` of one class, whose IoU is at least `min_iou`."""
    num_labels = 1 if across_classes else 1 + int(max(truths.label.max(initial=0), detections.label.max(initial=0)))
    truth_cells, detection_cells = (
        table.image * num_labels + (0 if across_classes else table.label) for table in (truths, detections)
    )
    detection_order = np.lexsort((-detections.scores, detection_cells))
    truth_order = np.argsort(truth_cells, kind="stable")
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for of_truths, of_detections in _shared_cells(truth_cells[truth_order], detection_cells[detection_order]):
        rows, columns = detection_order[of_detections], truth_order[of_truths]
        iou = mask.iou(
            detections.boxes_xywh_px[rows], truths.boxes_xywh_px[columns], truths.is_crowd[columns].astype(np.uint8)
        )
        row, column = (iou >= min_iou).nonzero()
        values = iou[row, column]
        by_rank = np.lexsort((columns[column], values, row))
        found.append((rows[row[by_rank]], columns[column[by_rank]], values[by_rank]))
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def match_greedily(
    pairs: Pairs,
    num_detections: int,
    is_crowd: NDArray[np.bool_],
    ignored_truths: NDArray[np.bool_],
    iou_thresholds: NDArray[np.float64],
) -> NDArray[np.int32]:
    """Row of the ground truth that each detection takes, NOT_MATCHED where none; int32 (V, T, N).

    Detections choose by descending score. Each takes the free ground truth of highest IoU at or above the threshold,
    the later one of equals, and one that is not ignored before any that is. Crowd boxes are never used up.
    `is_crowd` (G,); `ignored_truths` (V, G). `pairs` must reach down to the lowest threshold.

    All images are worked on together: in each round those detections choose whose candidates nobody of a higher score
    still waits for. There are as many rounds as the longest such queue.
    """
    num_views, num_thresholds = len(ignored_truths), len(iou_thresholds)
    # pycocotools' own bound.
    limits = np.minimum(iou_thresholds, 1 - 1e-10)[:, None]
    taken = np.full((num_views, num_thresholds, num_detections), NOT_MATCHED, np.int32)
    free = np.ones((num_views, num_thresholds, len(is_crowd)), bool)
    first = np.empty(len(is_crowd), np.int64)
    # Their place in this order is the detections' priority.
    priority = np.cumsum(np.diff(pairs.detection, prepend=-1) != 0)
    waiting = np.arange(len(pairs.iou))
    while len(waiting):
        truth = pairs.truth[waiting]
        # Of several assignments to one place the last stands: the highest priority.
        first[truth[::-1]] = priority[waiting[::-1]]
        starts = np.flatnonzero(np.diff(priority[waiting], prepend=0))
        is_next = np.logical_and.reduceat((first[truth] == priority[waiting]) | is_crowd[truth], starts)
        lengths = np.diff(starts, append=len(waiting))
        now = waiting[np.repeat(is_next, lengths)]
        waiting = waiting[~np.repeat(is_next, lengths)]
        starts = np.cumsum(lengths[is_next]) - lengths[is_next]

        truth, place = pairs.truth[now], np.arange(1, len(now) + 1, dtype=np.int32)
        # Candidates stand in ascending order: the last possible one is taken, those that are ignored only if need be.
        value = np.where(ignored_truths[:, truth], place, place + len(now))[:, None, :]
        value = value * (free[:, :, truth] & (pairs.iou[now] >= limits))
        best = np.maximum.reduceat(value, starts, axis=2)
        view, threshold, column = best.nonzero()
        chosen = (best[view, threshold, column] - 1) % len(now)
        taken[view, threshold, pairs.detection[now[chosen]]] = truth[chosen]
        free[view, threshold, truth[chosen]] = is_crowd[truth[chosen]]
    return taken


def _shared_cells(first: NDArray[np.int64], second: NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """Where each value that two sorted arrays share stands in both."""
    shared = np.intersect1d(first, second)
    ends = [np.searchsorted(column, shared, side) for column in (first, second) for side in ("left", "right")]
    for low, high, other_low, other_high in zip(*(end.tolist() for end in ends), strict=True):
        yield slice(low, high), slice(other_low, other_high)


@dataclass
class ImageMatches:
    """Outcome for one image at IoU .50, as rows of the annotations and of the detections.

    `hits` are (annotation, detection) pairs. Ignored are what the ignore rule takes out, crowd boxes, and detections
    that match a crowd box.
    """

    image_id: int
    hits: list[tuple[int, int]] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    false_positives: list[int] = field(default_factory=list)
    ignored_annotations: list[int] = field(default_factory=list)
    ignored_detections: list[int] = field(default_factory=list)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None without objects and false positives."""
        total = 2 * len(self.hits) + len(self.misses) + len(self.false_positives)
        return 2 * len(self.hits) / total if total else None


def match(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    ignore_rule: IgnoreRule,
    score_threshold: float,
) -> list[ImageMatches]:
    """One `ImageMatches` per image, in the order of the images, for detections with at least `score_threshold`."""
    tables = tabulate(ground_truth, detections)
    truths, found = tables.truths, tables.detections
    confident = found.scores >= score_threshold
    ignored_truths = in_ignore_regions(truths, tables.ignore_regions_xywh_px, ignore_rule) & ~truths.is_crowd
    ignored_found = in_ignore_regions(found, tables.ignore_regions_xywh_px, ignore_rule)
    truth_rows, rows = np.flatnonzero(~ignored_truths), np.flatnonzero(~ignored_found & confident)
    scored = truths.take(truth_rows)
    pairs = overlapping(scored, found.take(rows), 0.5)
    taken = match_greedily(pairs, len(rows), scored.is_crowd, scored.is_crowd[None], np.array([0.5]))[0, 0]

    matches = [ImageMatches(image_id) for image_id in tables.image_ids.tolist()]
    for row in np.flatnonzero(ignored_truths | truths.is_crowd).tolist():
        matches[truths.image[row]].ignored_annotations.append(row)
    for row in np.flatnonzero(ignored_found & confident).tolist():
        matches[found.image[row]].ignored_detections.append(row)
    for row, truth in zip(rows.tolist(), taken.tolist(), strict=True):
        outcome = matches[found.image[row]]
        if truth == NOT_MATCHED:
            outcome.false_positives.append(row)
        elif scored.is_crowd[truth]:
            outcome.ignored_detections.append(row)
        else:
            outcome.hits.append((int(truth_rows[truth]), row))
    hit = np.isin(np.arange(len(scored.image)), taken)
    for row in truth_rows[~hit & ~scored.is_crowd].tolist():
        matches[truths.image[row]].misses.append(row)
    by_id = {outcome.image_id: outcome for outcome in matches}
    return [by_id[image["id"]] for image in ground_truth["images"]]

"""What objects were taken for, and how many of each size were found.

Legend: C classes, G ground truths, N detections.
"""

from __future__ import annotations

import numpy as np

from evaluation.analysis_records import SIZES_PX, Confusion, SizeRecall
from evaluation.judged import IOU_OF_HIT, Judged, select
from evaluation.matching import NOT_MATCHED, match_greedily


def confusion(judged: Judged, threshold: float) -> Confusion:
    """Objects against the detections with at least `threshold`, for all classes the same; each is used once.

    First detections take objects of their own class, as in AP, so that the diagonal holds the hits; then those left
    over take objects left over, of other classes, again by descending score and at IoU >= .50. A row sums to the
    objects of its class, a column to the detections of its class that count.
    """
    truths, detections = judged.truths, judged.detections
    is_reported = judged.is_counted & (detections.scores >= threshold)
    is_hit, is_left = is_reported & judged.is_hit, judged.is_scored & (judged.found_at() < threshold)
    may_mistake = (is_reported & ~is_hit)[judged.overlaps.detection] & is_left[judged.overlaps.truth]
    left_over, ignored = select(judged.overlaps, may_mistake), ~judged.is_scored[None]
    mistaken = match_greedily(left_over, len(is_hit), truths.is_crowd, ignored, np.array([IOU_OF_HIT]))[0, 0]
    taken = np.where(is_hit, judged.taken, mistaken)[is_reported]

    num_classes = len(judged.class_names)
    # NOT_MATCHED, -1, finds the last entry: no object.
    true_labels = np.append(truths.label, num_classes)[taken]
    is_left[taken[taken != NOT_MATCHED]] = False
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(counts, (true_labels, detections.label[is_reported]), 1)
    counts[:, num_classes] += np.bincount(truths.label[is_left], minlength=num_classes + 1)
    return Confusion(judged.class_names, counts.tolist())


def recall_by_size(judged: Judged, threshold: float) -> list[SizeRecall]:
    """Objects found at any score and at `threshold`, by size; a side on a bound belongs to the larger size.

    The side is the root of the annotation's area, which need not be that of its box.
    """
    label, found_at = judged.truths.label[judged.is_scored], judged.found_at()[judged.is_scored]
    sides_px = np.array([low for low, _ in SIZES_PX.values()], np.float64)
    size = np.searchsorted(sides_px**2, judged.truths.areas_px[judged.is_scored], side="right") - 1
    names = judged.class_names
    counts = np.zeros((len(SIZES_PX), len(names), 3), np.int64)
    for column, is_in in enumerate((np.ones(len(label), bool), found_at >= 0, found_at >= threshold)):
        np.add.at(counts[..., column], (size[is_in], label[is_in]), 1)
    recalls = []
    for size_name, of_size in zip(SIZES_PX, counts, strict=True):
        num_objects, num_found, num_used = of_size.sum(axis=0).tolist()
        per_class = {name: (n, found, used) for name, (n, found, used) in zip(names, of_size.tolist(), strict=True)}
        recalls.append(SizeRecall(size_name, num_objects, num_found, num_used, per_class))
    return recalls

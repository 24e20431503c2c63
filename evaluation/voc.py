"""The Pascal VOC protocol: mAP at IoU .50 by the devkit's rule of matching, AP over all points as from 2010 on.

A detection belongs to the object that it overlaps most, whether another one has taken it or not: there is no second
choice. Difficult objects, which are crowd boxes here, count neither way. Boxes are continuous: an XML's inclusive
corners are `w = xmax - xmin + 1`, which makes IoU what the devkit computes.

Facts: VOC2012 development kit; Everingham et al. 2015.

Legend: C classes, G ground truths, N detections.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.coco import scored_rows
from evaluation.ignore import IgnoreRule
from evaluation.matching import overlapping
from evaluation.score import Score
from evaluation.tables import DetectionTable, Tables, TruthTable

_MIN_IOU = 0.5


class RankedOutcomes(NamedTuple):
    """What became of each detection at one IoU threshold, by class and descending score.

    `is_hit` (N,); `is_counted` (N,): hit or false positive; `is_scored` (G,): the ground truths to be found.
    """

    truths: TruthTable
    detections: DetectionTable
    is_hit: NDArray[np.bool_]
    is_counted: NDArray[np.bool_]
    is_scored: NDArray[np.bool_]


def score_voc(tables: Tables, *, ignore_rule: IgnoreRule) -> Score:
    """`voc/mAP50`, the mean over the classes with ground truth, and `voc/AP50` of each class.

    What `covered-half` takes out is dropped first, as in `evaluation.coco.score_tables`; `counts` as there. Equal
    scores stay in the order of the images, then of the file.
    """
    truths, detections, num_ignored = scored_rows(tables, ignore_rule)
    outcomes = voc_outcomes(truths, detections)
    per_class: dict[str, dict[str, float | None]] = {}
    for label, name in enumerate(tables.class_names):
        num_truths = int((outcomes.is_scored & (truths.label == label)).sum())
        rows = outcomes.detections.label == label
        ap = average_precision(outcomes.is_hit[rows], outcomes.is_counted[rows], num_truths)
        per_class[name] = {"voc/AP50": ap, "num_ground_truths": float(num_truths)}
    counts = {
        "num_images": len(tables.image_ids),
        "num_ground_truths": int(outcomes.is_scored.sum()),
        "num_crowds": int(truths.is_crowd.sum()),
        "num_detections": len(detections.label),
        **num_ignored,
    }
    return Score({"voc/mAP50": mean_over_classes(per_class, "voc/AP50")}, per_class, counts)


def voc_outcomes(truths: TruthTable, detections: DetectionTable) -> RankedOutcomes:
    """Match at IoU .50."""
    detections = detections.take(by_class_and_score(detections))
    # A crowd box's own IoU is another one; difficult objects have the usual.
    plain = truths._replace(is_crowd=np.zeros_like(truths.is_crowd))
    pairs = overlapping(plain, detections, _MIN_IOU)
    # Of a detection's pairs the one with the highest IoU stands last, the first object of equal ones.
    starts = np.cumsum(np.diff(pairs.detection, prepend=-1) != 0)
    order = np.lexsort((-pairs.truth, pairs.iou, starts))
    best = order[np.flatnonzero(np.diff(starts, append=-1))]
    detection, truth = pairs.detection[best], pairs.truth[best]
    _, first = np.unique(truth, return_index=True)
    is_difficult = truths.is_crowd[truth]
    is_hit, is_counted = np.zeros(len(detections.label), bool), np.ones(len(detections.label), bool)
    is_hit[detection[first]] = ~is_difficult[first]
    is_counted[detection[is_difficult]] = False
    return RankedOutcomes(truths, detections, is_hit, is_counted, ~truths.is_crowd)


def by_class_and_score(detections: DetectionTable) -> NDArray[np.int64]:
    """Rows by class, then descending score; equal scores in the order of the images, then of the table."""
    order: NDArray[np.int64] = np.lexsort((detections.image, -detections.scores, detections.label))
    return order


def average_precision(is_hit: NDArray[np.bool_], is_counted: NDArray[np.bool_], num_truths: int) -> float | None:
    """Area under the highest precision at or beyond each recall, every point of it; None without ground truth.

    `is_hit` and `is_counted` (N,) by descending score.
    """
    if num_truths == 0:
        return None
    # Each hit adds one step of recall, and between two of them precision only falls.
    precision = np.arange(1, is_hit.sum() + 1) / np.cumsum(is_counted)[is_hit]
    return float(np.maximum.accumulate(precision[::-1]).sum()) / num_truths


def mean_over_classes(per_class: dict[str, dict[str, float | None]], metric: str) -> float | None:
    """Mean of one metric over the classes that have it; None where none has."""
    known = [value for values in per_class.values() if (value := values[metric]) is not None]
    return float(np.mean(known)) if known else None

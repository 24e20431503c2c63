"""Which kinds of error keep AP50 from 1, after TIDE (Bolya et al. 2020, section 2).

Legend: C classes, G ground truths, N detections.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.analysis_records import ErrorTypes
from evaluation.coco import mean_of_known
from evaluation.judged import IOU_OF_BACKGROUND, IOU_OF_HIT, Judged
from evaluation.matching import NOT_MATCHED
from evaluation.outcomes import Outcomes, curves_of

# Those of detections; `missed` is one of objects.
_OF_DETECTIONS = ("class", "localisation", "both", "duplicate", "background")
TYPES = (*_OF_DETECTIONS, "missed")


class _Errors(NamedTuple):
    """`kind` (N,): one of `_OF_DETECTIONS`, "" for hits and what does not count; `meant` (N,): row of the object that a
    `class` or `localisation` error stands for, else NOT_MATCHED.
    """

    kind: NDArray[np.str_]
    meant: NDArray[np.int64]


def error_types(judged: Judged, threshold: float) -> ErrorTypes:
    """Type of every error at or above `threshold`, and AP50 lost to each type, over detections of all scores.

    A false positive is, by its highest IoU with objects of its own class and of others, taken or not, the first of:
    `localisation` (own class, .1 to below .5), `class` (other, at least .5), `duplicate` (own, at least .5: somebody
    else has the object), `background` (all below .1), `both` (other, .1 to below .5). An object that nothing found is
    `missed` unless a `class` or `localisation` error stands for it. In ignore regions and on crowds of its class a
    detection is no error; a crowd box is no object to be near to.

    The mending of each type: `class` and `localisation` errors become hits of the object they stand for; if that is
    taken they go, and of several the one of the highest score stays. `both`, `duplicate` and `background` errors go.
    `missed` objects need not be found. `false positives`: all errors of detections go. `false negatives`: no object
    that was not found need be.

    The paper leaves open: the order of the types (that of its authors' tool here); whether a mended detection may
    take an object from a hit of a lower score (no, as there); what a bound belongs to (the better overlap); AP of a
    class whose objects were all missed, once they need not be found (1 if no detection of it is wrong, else 0).
    Other than that tool: COCO's limit on detections and matching; classes without objects have no AP; and of the
    errors that stand for one object the best of each type is mended, there the best of `class` and `localisation`
    together.
    """
    errors = _classified(judged)
    above = judged.detections.scores >= threshold
    counts = {kind: int((above & (errors.kind == kind)).sum()) for kind in _OF_DETECTIONS}
    counts["missed"] = int(_missed(judged, errors, threshold).sum())
    ap50 = _mended_ap50(judged, errors, ())
    if ap50 is None:
        return ErrorTypes(None, counts, {})
    mended = {kind: _mended_ap50(judged, errors, (kind,)) for kind in TYPES}
    mended["false positives"] = _ap50(judged, judged.detections.label, judged.is_hit, judged.is_hit, judged.is_scored)
    mended["false negatives"] = _ap50(
        judged, judged.detections.label, judged.is_hit, judged.is_counted, judged.found_at() >= 0
    )
    return ErrorTypes(ap50, counts, {name: value - ap50 for name, value in mended.items() if value is not None})


def _classified(judged: Judged) -> _Errors:
    own_iou, own_object = _nearest(judged, judged.is_own_class)
    other_iou, other_object = _nearest(judged, ~judged.is_own_class)
    kind = np.select(
        [
            ~judged.is_counted | judged.is_hit,
            (own_iou >= IOU_OF_BACKGROUND) & (own_iou < IOU_OF_HIT),
            other_iou >= IOU_OF_HIT,
            own_iou >= IOU_OF_HIT,
            other_iou < IOU_OF_BACKGROUND,
        ],
        ["", "localisation", "class", "duplicate", "background"],
        "both",
    )
    meant = np.select([kind == "localisation", kind == "class"], [own_object, other_object], NOT_MATCHED)
    return _Errors(kind, meant)


def _nearest(judged: Judged, rows: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Highest IoU of each detection among these pairs, 0 where none, and the object's row; both (N,)."""
    num_detections = len(judged.detections.label)
    iou, nearest = np.zeros(num_detections), np.full(num_detections, NOT_MATCHED)
    # A detection's pairs stand in ascending order: of several assignments the last stands.
    iou[judged.overlaps.detection[rows]] = judged.overlaps.iou[rows]
    nearest[judged.overlaps.detection[rows]] = judged.overlaps.truth[rows]
    return iou, nearest


def _missed(judged: Judged, errors: _Errors, threshold: float) -> NDArray[np.bool_]:
    is_meant = np.zeros(len(judged.is_scored), bool)
    is_meant[errors.meant[(errors.meant != NOT_MATCHED) & (judged.detections.scores >= threshold)]] = True
    return judged.is_scored & (judged.found_at() < threshold) & ~is_meant


def _mended_ap50(judged: Judged, errors: _Errors, types: Collection[str]) -> float | None:
    """AP50 as if there were no errors of these types; None without objects."""
    is_mended = np.isin(errors.kind, list(types))
    rows = np.flatnonzero(is_mended & (errors.meant != NOT_MATCHED))
    rows = rows[judged.found_at()[errors.meant[rows]] < 0]
    rows = rows[np.argsort(-judged.detections.scores[rows], kind="stable")]
    # The first to stand for an object has the highest score.
    taken, first = np.unique(errors.meant[rows], return_index=True)
    is_hit, label = judged.is_hit.copy(), judged.detections.label.copy()
    is_hit[rows[first]] = True
    label[rows[first]] = judged.truths.label[taken]
    is_scored = judged.is_scored
    if "missed" in types:
        is_scored = is_scored & ~_missed(judged, errors, 0.0)
    return _ap50(judged, label, is_hit, is_hit | (judged.is_counted & ~is_mended), is_scored)


def _ap50(
    judged: Judged,
    label: NDArray[np.int64],
    is_hit: NDArray[np.bool_],
    is_counted: NDArray[np.bool_],
    is_scored: NDArray[np.bool_],
) -> float | None:
    """Mean over the classes that have objects in `judged`, also where `is_scored` leaves none of them."""
    num_classes = len(judged.class_names)
    # Equal scores in the order of their images, as COCO has them.
    order = np.lexsort((judged.detections.image, -judged.detections.scores, label))
    order = order[is_counted[order]]
    outcomes = Outcomes(
        judged.truths,
        judged.detections.take(order)._replace(label=label[order]),
        np.zeros(len(order), np.int64),
        is_hit[order][None, None],
        np.ones((1, 1, len(order)), bool),
        is_scored[None],
    )
    precision = curves_of(outcomes, num_classes, ()).precision[0, :, :, 0]
    had_objects, has_objects, has_errors = (
        np.bincount(labels, minlength=num_classes) > 0
        for labels in (judged.truths.label[judged.is_scored], judged.truths.label[is_scored], label[order])
    )
    precision = np.where(had_objects & ~has_objects, np.where(has_errors, 0.0, 1.0), precision)
    return mean_of_known(precision)

"""The score from which detections count in use: where F1 is highest, for each class and for all together.

Legend: K detections that count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.analysis_records import OperatingPoint, Threshold
from evaluation.judged import Judged


class _Part(NamedTuple):
    """`scores` and `is_hit` (K,), by descending score, and the objects to be found: of one class, or of all."""

    scores: NDArray[np.float64]
    is_hit: NDArray[np.bool_]
    num_objects: int


def choose_operating_point(judged: Judged) -> OperatingPoint:
    """Thresholds of the highest F1 at IoU .50; of equal F1 the higher. None where no threshold gives a hit.

    Candidates are the detections' own scores. `overall` is one threshold for all classes: F1 over all objects and
    detections together, in which frequent classes weigh more.
    """
    return OperatingPoint(
        _best(_part(judged)), {name: _best(_part(judged, label)) for label, name in enumerate(judged.class_names)}
    )


def measure_operating_point(judged: Judged, chosen: OperatingPoint) -> OperatingPoint:
    """The same scores and what they give here; None where `chosen` has none.

    Without objects here they give None, with objects precision is 0 where nothing is reported.
    """
    return OperatingPoint(
        _measured(_part(judged), chosen.overall),
        {
            name: _measured(_part(judged, row), chosen.per_class.get(name))
            for row, name in enumerate(judged.class_names)
        },
    )


def _part(judged: Judged, label: int | None = None) -> _Part:
    rows, objects = judged.is_counted, judged.is_scored
    if label is not None:
        rows, objects = rows & (judged.detections.label == label), objects & (judged.truths.label == label)
    order = np.flatnonzero(rows)
    order = order[np.argsort(-judged.detections.scores[order], kind="stable")]
    return _Part(judged.detections.scores[order], judged.is_hit[order], int(objects.sum()))


def _best(part: _Part) -> Threshold | None:
    if not part.is_hit.any():
        return None
    # Equal scores pass a threshold together.
    last = np.flatnonzero(np.diff(part.scores, append=-1.0))
    f1 = 2 * np.cumsum(part.is_hit)[last] / (last + 1 + part.num_objects)
    return _threshold(part, float(part.scores[last[np.argmax(f1)]]))


def _measured(part: _Part, chosen: Threshold | None) -> Threshold | None:
    if chosen is None or part.num_objects:
        return None if chosen is None else _threshold(part, chosen.score)
    return Threshold(chosen.score, precision=None, recall=None, f1=None)


def _threshold(part: _Part, score: float) -> Threshold:
    is_reported = part.scores >= score
    num_reported, num_hits = int(is_reported.sum()), int(part.is_hit[is_reported].sum())
    return Threshold(
        score,
        precision=num_hits / max(1, num_reported),
        recall=num_hits / part.num_objects,
        f1=2 * num_hits / (num_reported + part.num_objects),
    )

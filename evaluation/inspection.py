"""Image-level rates, as inspection counts them: defects that escape, good parts that are stopped.

Legend: I images, N detections, S thresholds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.analysis_records import Inspection, InspectionPoint
from evaluation.judged import Judged
from evaluation.tables import Tables

_THRESHOLDS: NDArray[np.float64] = np.arange(101) / 100


def inspection(tables: Tables, judged: Judged, threshold: float) -> Inspection:
    """Rates at the operating point, and at 0, .01, ... 1.

    An image with objects escapes when nothing is reported in it. Anything reported catches it, also of another class
    or elsewhere in the image: this says nothing about finding the defect itself, which recall does. What is ignored,
    in an ignore region or on a crowd, is not reported. An image without objects has no annotation at all; one with
    nothing but crowds or ignored objects is not known to be good and need not be stopped: it belongs to neither.
    """
    num_images = len(tables.image_ids)
    has_objects = np.bincount(judged.truths.image[judged.is_scored], minlength=num_images) > 0
    is_clean = np.bincount(tables.truths.image, minlength=num_images) == 0
    image, scores = judged.detections.image[judged.is_counted], judged.detections.scores[judged.is_counted]
    highest = np.full(num_images, -1.0)
    np.maximum.at(highest, image, scores)

    thresholds = np.append(_THRESHOLDS, threshold)
    rates = (
        _rates(_num_below(highest[has_objects], thresholds), has_objects),
        _rates(is_clean.sum() - _num_below(highest[is_clean], thresholds), is_clean),
        _rates(is_clean[image].sum() - _num_below(scores[is_clean[image]], thresholds), is_clean),
    )
    points = [InspectionPoint(*point) for point in zip(thresholds.tolist(), *rates, strict=True)]
    return Inspection(
        int(has_objects.sum()),
        int(is_clean.sum()),
        points[-1],
        points[: len(_THRESHOLDS)],
    )


def _num_below(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many scores do not reach each threshold (S,)."""
    return np.searchsorted(np.sort(scores), thresholds, side="left").astype(np.int64)


def _rates(counts: NDArray[np.int64], images: NDArray[np.bool_]) -> list[float | None]:
    """Counts per image of these (S,); None where there are none."""
    rates: list[float | None] = (counts / images.sum()).tolist() if images.any() else [None] * len(counts)
    return rates

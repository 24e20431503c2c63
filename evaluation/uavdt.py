"""The UAVDT-DET protocol: AP at IoU .70, all classes as one, equal to the official toolkit's number.

Beside it, per class: the official category AP, in which detections have no class, the objects of all other classes
stay to be found and cannot be, so that it is low where a class is rare; and a class-aware AP at the same IoU.

Facts: the UAVDT toolkit (UAV-benchmark-MOTD_v1.0); Du et al. 2018.

Legend: C classes, G ground truths, N detections.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.matching import NOT_MATCHED, match_greedily, overlapping
from evaluation.score import Score
from evaluation.tables import DetectionTable, Tables, TruthTable, rows_by_image
from evaluation.voc import RankedOutcomes, average_precision, by_class_and_score, mean_over_classes

Table = TypeVar("Table", TruthTable, DetectionTable)

# Label of detections whose class is not known, as in official submissions.
NO_CLASS = -1
# The toolkit does not read these two sequences' files of ignore regions, so no published number has used them. An
# image's sequence is the folder that it lies in.
IGNORE_REGIONS_NOT_READ = ("M0209", "M0801")
MIN_IOU = 0.7


def score_uavdt(tables: Tables) -> Score:
    """`uavdt/AP70` and, where all detections have a class, `uavdt/AP70_class_aware`, the mean over the classes.

    Of each class `uavdt/AP70_category`, the official one, and `uavdt/AP70_class_aware`. Detections strictly inside an
    ignore region are dropped and counted, objects are not. There is no limit on detections. Equal scores stay in the
    order of the images, then of the file.
    """
    truths, (pooled, is_dropped) = tables.truths, pooled_outcomes(tables)
    detections = tables.detections.take(~is_dropped)
    one_truths, one_detections = _as_one_class(truths), _as_one_class(detections)
    num_truths = int(pooled.is_scored.sum())
    metrics = {"uavdt/AP70": average_precision(pooled.is_hit, pooled.is_counted, num_truths)}
    counts = {
        "num_images": len(tables.image_ids),
        "num_ground_truths": num_truths,
        "num_crowds": len(truths.label) - num_truths,
        "num_detections": len(detections.label),
        "num_hits": int(pooled.is_hit.sum()),
        "num_ignored_detections": int(is_dropped.sum()),
    }

    per_class: dict[str, dict[str, float | None]] = {}
    has_classes = bool((tables.detections.label != NO_CLASS).all())
    for label, name in enumerate(tables.class_names):
        can_be_hit = (truths.label == label) | truths.is_crowd
        official = uavdt_outcomes(one_truths.take(can_be_hit), one_detections)
        num_of_class = int((pooled.is_scored & (truths.label == label)).sum())
        values = {
            "uavdt/AP70_category": average_precision(official.is_hit, official.is_counted, num_truths)
            if num_of_class
            else None
        }
        if has_classes:
            own = uavdt_outcomes(truths.take(truths.label == label), detections.take(detections.label == label))
            values["uavdt/AP70_class_aware"] = average_precision(own.is_hit, own.is_counted, num_of_class)
        per_class[name] = {**values, "num_ground_truths": float(num_of_class)}
    if has_classes:
        metrics["uavdt/AP70_class_aware"] = mean_over_classes(per_class, "uavdt/AP70_class_aware")
    return Score(metrics, per_class, counts)


def pooled_outcomes(tables: Tables) -> tuple[RankedOutcomes, NDArray[np.bool_]]:
    """What became of the detections with all classes as one, and which were dropped before; bool, one a detection."""
    is_dropped = strictly_inside_regions(tables.detections, tables)
    detections = tables.detections.take(~is_dropped)
    return uavdt_outcomes(_as_one_class(tables.truths), _as_one_class(detections)), is_dropped


def class_aware_outcomes(tables: Tables) -> RankedOutcomes:
    """What became of the detections when each has to find an object of its own class."""
    kept = ~strictly_inside_regions(tables.detections, tables)
    return uavdt_outcomes(tables.truths, tables.detections.take(kept))


def _as_one_class(table: Table) -> Table:
    return table._replace(label=np.zeros_like(table.label))


def uavdt_outcomes(truths: TruthTable, detections: DetectionTable) -> RankedOutcomes:
    """Match at IoU .70 within each class, greedily by score."""
    detections = detections.take(by_class_and_score(detections))
    pairs = overlapping(truths, detections, MIN_IOU)
    thresholds = np.array([MIN_IOU])
    taken = match_greedily(pairs, len(detections.label), truths.is_crowd, truths.is_crowd[None], thresholds)[0, 0]
    # NOT_MATCHED, -1, finds the last entry.
    is_on_crowd = np.append(truths.is_crowd, False)[taken]
    is_hit = (taken != NOT_MATCHED) & ~is_on_crowd
    return RankedOutcomes(truths, detections, is_hit, ~is_on_crowd, ~truths.is_crowd)


def strictly_inside_regions(detections: DetectionTable, tables: Tables) -> NDArray[np.bool_]:
    """True for each detection that lies in an ignore region of its image and touches none of its sides; bool (N,)."""
    inside = np.zeros(len(detections.image), bool)
    by_image = rows_by_image(detections, len(tables.image_ids))
    for rows, name, regions in zip(by_image, tables.file_names, tables.ignore_regions_xywh_px, strict=True):
        if len(regions) and PurePosixPath(name).parent.name not in IGNORE_REGIONS_NOT_READ:
            inside[rows] = lies_inside(detections.boxes_xywh_px[rows], regions)
    return inside


def lies_inside(boxes_xywh_px: NDArray[np.float64], regions_xywh_px: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True for each box (N, 4) that lies strictly inside one of the regions (R, 4); bool (N,)."""
    boxes, regions = boxes_xywh_px[:, None], regions_xywh_px[None]
    begins = boxes[..., :2] > regions[..., :2]
    ends = boxes[..., :2] + boxes[..., 2:] < regions[..., :2] + regions[..., 2:]
    inside: NDArray[np.bool_] = np.any((begins & ends).all(axis=2), axis=1)
    return inside

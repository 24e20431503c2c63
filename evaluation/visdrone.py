"""The VisDrone-DET protocol, equal to the official toolkit's numbers.

It differs from COCO in nearly everything: ignore regions are pixels, the limit on detections counts all classes of an
image together, in the order of the file, AP is the area under the whole curve, and a class counts in the mean once for
every image that has it.

Facts: VisDrone/VisDrone2018-DET-toolkit at 0054457; Zhu et al. 2021.

Legend: I images, M limits on detections, T=10 IoU thresholds, C classes, G ground truths, N detections, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.ignore import covered_area_px
from evaluation.matching import NOT_MATCHED, Pairs, match_greedily, overlapping, ranks
from evaluation.outcomes import IOU_THRESHOLDS
from evaluation.score import Score
from evaluation.tables import DetectionTable, Tables, TruthTable, rows_by_image
from evaluation.voc import average_precision

# Detections of this class use up the limit, and are not scored; nor are its objects: a detection on one is a false
# positive.
NOT_SCORED = "others"
_MAX_NAMED = 3


class UnknownImageSize(ValueError):
    """Images with ignore regions whose size is not known, so that the regions' pixels are not either."""


class VisDroneOutcomes(NamedTuple):
    """What is left after the drop, and what became of it; both tables without the class that is not scored.

    `detections` are those within the last limit, by class and descending score, equal ones in the order of the images'
    names, then of the file. `is_hit` (M, T, N): it takes an object when the detections within the first, second... of
    `limits` take part; `is_counted` (T, N): hit or false positive, with those within the last limit; `is_scored` (G,):
    the ground truths to be found. `counts` as in `score_visdrone`.
    """

    truths: TruthTable
    detections: DetectionTable
    limits: tuple[int, ...]
    is_hit: NDArray[np.bool_]
    is_counted: NDArray[np.bool_]
    is_scored: NDArray[np.bool_]
    counts: dict[str, int]


def score_visdrone(tables: Tables, max_dets: int = 500) -> Score:
    """`visdrone/AP`, `AP50`, `AP75`, `AR_1`, `AR_10`, `AR_100` and AR at `max_dets`, and all of them as `..._macro`.

    The official mean weighs a class by the number of images that have it, after the drop; the macro mean does not.
    Of each class the same, with `num_images` and `num_ground_truths`.

    Detections must be in the order that the official toolkit would read, best first: it cuts them off in that order.
    `num_unsorted_images` of the `counts` have them in another. A class called `others` is not scored.

    Raises:
        UnknownImageSize: an image has ignore regions and no size.
        ValueError: `max_dets` is below 1.
    """
    outcomes = visdrone_outcomes(tables, max_dets)
    truths, num_classes = outcomes.truths.take(outcomes.is_scored), len(tables.class_names)
    num_truths = np.bincount(truths.label, minlength=num_classes)
    has_class = np.zeros((len(tables.image_ids), num_classes), bool)
    has_class[truths.image, truths.label] = True
    num_images = has_class.sum(axis=0)
    names = ["AP", "AP50", "AP75", *(f"AR_{limit}" for limit in outcomes.limits)]
    values = class_values(outcomes, num_truths)

    metrics = {f"visdrone/{name}": _mean(row, num_images) for name, row in zip(names, values, strict=True)}
    metrics |= {f"visdrone/{name}_macro": _mean(row, num_truths > 0) for name, row in zip(names, values, strict=True)}
    per_class: dict[str, dict[str, float | None]] = {
        class_name: {
            **{
                f"visdrone/{name}": _mean(row[[label]], num_images[[label]])
                for name, row in zip(names, values, strict=True)
            },
            "num_images": float(num_images[label]),
            "num_ground_truths": float(num_truths[label]),
        }
        for label, class_name in enumerate(tables.class_names)
        if class_name != NOT_SCORED
    }
    return Score(metrics, per_class, outcomes.counts)


def class_values(outcomes: VisDroneOutcomes, num_truths: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP, AP50, AP75 and AR at each limit of each class, (3 + M, C), 0 without ground truth; `num_truths` (C,)."""
    values = np.zeros((3 + len(outcomes.limits), len(num_truths)))
    for label in np.flatnonzero(num_truths).tolist():
        rows, found = outcomes.detections.label == label, int(num_truths[label])
        is_hit, is_counted = outcomes.is_hit[:, :, rows], outcomes.is_counted[:, rows]
        by_iou = [average_precision(hit, counted, found) for hit, counted in zip(is_hit[-1], is_counted, strict=True)]
        ap = np.array(by_iou, np.float64)
        values[:, label] = [ap.mean(), ap[0], ap[5], *(is_hit.sum(axis=2) / found).mean(axis=1)]
    return values


def _mean(values: NDArray[np.float64], weights: NDArray[Any]) -> float | None:
    return float(np.average(values, weights=weights)) if weights.any() else None


def visdrone_outcomes(tables: Tables, max_dets: int = 500) -> VisDroneOutcomes:
    """Drop, cut off and match; what it raises, see `score_visdrone`."""
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1")
    limits = (*(limit for limit in (1, 10, 100) if limit < max_dets), max_dets)
    dropped_truths = in_ignored_pixels(tables.truths, tables)
    dropped = in_ignored_pixels(tables.detections, tables)
    truths, detections = tables.truths.take(~dropped_truths), tables.detections.take(~dropped)
    place = places_in_file(detections)
    within = place < max_dets
    is_scored_class = np.array([name != NOT_SCORED for name in tables.class_names], bool)
    scored_truths = truths.take(is_scored_class[truths.label])
    counts = {
        "num_images": len(tables.image_ids),
        "num_ground_truths": int((~scored_truths.is_crowd).sum()),
        "num_crowds": int(scored_truths.is_crowd.sum()),
        "num_unscored_ground_truths": len(truths.label) - len(scored_truths.label),
        "num_detections": len(detections.label),
        "num_unscored_detections": int((~is_scored_class[detections.label]).sum()),
        "num_ignored_ground_truths": int(dropped_truths.sum()),
        "num_ignored_detections": int(dropped.sum()),
        "num_truncated_detections": int((~within).sum()),
        "num_unsorted_images": _num_unsorted(tables.detections),
    }

    rows = np.flatnonzero(within & is_scored_class[detections.label])
    # The toolkit goes through the images by name.
    by_name = np.argsort(np.argsort(np.array(tables.file_names, object), kind="stable"))
    order = np.lexsort((by_name[detections.image[rows]], -detections.scores[rows], detections.label[rows]))
    detections, place = detections.take(rows[order]), place[rows[order]]
    is_hit, is_counted = match(scored_truths, detections, place, limits)
    return VisDroneOutcomes(scored_truths, detections, limits, is_hit, is_counted, ~scored_truths.is_crowd, counts)


def match(
    truths: TruthTable, detections: DetectionTable, place: NDArray[np.int64], limits: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`is_hit` (M, T, N) and `is_counted` (T, N) of `VisDroneOutcomes`; `place` (N,) is what the limits cut off."""
    pairs = overlapping(truths, detections, float(IOU_THRESHOLDS.min()))
    # For NOT_MATCHED, -1: it finds the last entry.
    is_crowd = np.append(truths.is_crowd, False)
    hits = []
    for limit in limits:
        # Each limit is a match of its own: in a file that is not sorted the first are not the best.
        takes_part = place[pairs.detection] < limit
        within = Pairs(pairs.detection[takes_part], pairs.truth[takes_part], pairs.iou[takes_part])
        taken = match_greedily(within, len(place), truths.is_crowd, truths.is_crowd[None], IOU_THRESHOLDS)[0]
        hits.append((taken != NOT_MATCHED) & ~is_crowd[taken])
    return np.stack(hits), ~is_crowd[taken]


def in_ignored_pixels(table: TruthTable | DetectionTable, tables: Tables) -> NDArray[np.bool_]:
    """True for each row with at least half of its pixels in those of its image's regions; bool (N,)."""
    regions = tables.ignore_regions_xywh_px
    unknown = [
        tables.file_names[image] or str(tables.image_ids[image])
        for image in range(len(regions))
        if len(regions[image]) and not tables.image_sizes_px[image].all()
    ]
    if unknown:
        raise UnknownImageSize(
            f"{len(unknown)} images have ignore regions and no known size, for example "
            f"{', '.join(map(repr, unknown[:_MAX_NAMED]))}; the protocol needs it: add it (speck score: "
            "--image-sizes, by names without suffix, of UAVDT by sequence)"
        )
    ignored = np.zeros(len(table.image), bool)
    by_image = zip(rows_by_image(table, len(regions)), regions, tables.image_sizes_px, strict=True)
    for rows, found, size_px in by_image:
        if len(found):
            ignored[rows] = covered_fraction(table.boxes_xywh_px[rows], found, size_px) >= 0.5
    return ignored


def covered_fraction(
    boxes_xywh_px: NDArray[np.float64], regions_xywh_px: NDArray[np.float64], size_px: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Share of each box (N, 4) in the union of the regions (R, 4), in the toolkit's whole pixels; (N,).

    Pixels count from 1, and a box begins at max(1, x): a region covers pixels x to x + w, both included, a box is
    looked at from x + 1 to x + w. What lies outside the image is not covered, but belongs to the box's area.
    Of whole numbers the covered area of rectangles is the number of pixels, so no mask is painted.
    """
    boxes, regions = whole_pixels(boxes_xywh_px, size_px), whole_pixels(regions_xywh_px, size_px)
    seen, painted = (
        np.concatenate([table[:, :2], np.minimum(size_px, table[:, :2] + table[:, 2:])], axis=1)
        for table in (boxes, regions)
    )
    painted[:, :2] -= 1
    for corners in (seen, painted):
        corners[:, 2:] -= corners[:, :2]
    fraction: NDArray[np.float64] = covered_area_px(seen, painted) / (boxes[:, 2] * boxes[:, 3])
    return fraction


def whole_pixels(boxes_xywh_px: NDArray[np.float64], size_px: NDArray[np.int64]) -> NDArray[np.float64]:
    """Boxes (N, 4) as the toolkit rounds them: halves away from zero, at least 1, x and y within the image."""
    whole = np.maximum(1.0, np.floor(boxes_xywh_px + 0.5))
    whole[:, :2] = np.minimum(whole[:, :2], size_px)
    return whole


def places_in_file(detections: DetectionTable) -> NDArray[np.int64]:
    """Place of each detection among all of its image, from 0, in the order of the table; (N,)."""
    return ranks(detections._replace(scores=np.zeros(len(detections.scores))), detections.image)


def _num_unsorted(detections: DetectionTable) -> int:
    order = np.argsort(detections.image, kind="stable")
    image, scores = detections.image[order], detections.scores[order]
    return len(np.unique(image[1:][(np.diff(image) == 0) & (np.diff(scores) > 0)]))

"""The COCO protocol. pycocotools computes every reported number; this file feeds, silences and reads it correctly.

Legend: T=10 IoU thresholds, C classes, A areas, M limits on detections.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.ignore import IgnoreRule, in_ignore_regions
from evaluation.matching import ranks
from evaluation.outcomes import Areas, Curves, curves_of, outcomes_of
from evaluation.score import Score
from evaluation.tables import DetectionTable, Tables, TruthTable, tabulate

# redirect_stdout swaps a global: two threads inside it at once would leave the process silenced for good.
_PRINTING = threading.Lock()


class CocoRules(NamedTuple):
    """What sets relatives of the COCO protocol apart.

    `prefix` of the metrics' names; `areas` in square pixels by name, both ends included, "all" first; `limits`:
    detections per image and class at which AR is read, and at the last of them AP.
    """

    prefix: str
    areas: Areas
    limits: tuple[int, ...]


def coco_rules(max_dets: int = 100) -> CocoRules:
    """COCO's own areas; AR at 1, 10 and `max_dets`. Raises ValueError if that is below 1."""
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1")
    limits = (*(limit for limit in (1, 10) if limit < max_dets), max_dets)
    everything = 1e5**2
    areas = {"all": (0, everything), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, everything)}
    return CocoRules("coco", areas, limits)


def aitod_rules() -> CocoRules:
    """AI-TOD: COCO with other areas, from very tiny objects (2 to 8 px) to medium ones (32 to 64), at 1500 detections.

    An object of 8, 16 or 32 px belongs to both its neighbours, as in pycocotools. Some copies of that benchmark's code
    let the smallest begin at 0 and the largest never end; only their AP_medium differs noticeably.
    """
    sides = {"verytiny": (2, 8), "tiny": (8, 16), "small": (16, 32), "medium": (32, 64)}
    areas = {"all": (0.0, 1e5**2)} | {name: (float(low**2), float(high**2)) for name, (low, high) in sides.items()}
    return CocoRules("aitod", areas, (1, 100, 1500))


def score(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    max_dets: int = 100,
    ignore_rule: IgnoreRule,
    by_pycocotools: bool = True,
) -> Score:
    """COCO metrics of COCO dicts, see `score_tables`.

    Raises:
        BadGroundTruth: repeated image id, category id or class name; an annotation with an unknown image or category,
            or whose box is not finite or has no positive size.
        BadDetections: unknown image or category; a box that is not finite or has no positive size; a score that is
            missing or outside 0..1.
        ValueError: `max_dets` is below 1.
    """
    rules = coco_rules(max_dets)
    return score_tables(
        tabulate(ground_truth, detections), rules, ignore_rule=ignore_rule, by_pycocotools=by_pycocotools
    )


def score_tables(tables: Tables, rules: CocoRules, *, ignore_rule: IgnoreRule, by_pycocotools: bool = True) -> Score:
    """Metrics over **all** images, also those without detections or objects.

    Under `covered-half` a ground truth or detection with at least half of its own area in the union of its image's
    ignore regions is dropped before scoring, and counted; crowd boxes stay. Detections are truncated per image and
    class; AP is read at the last limit.

    Without `by_pycocotools` the same numbers come, to rounding, from `evaluation.outcomes`, in a fraction of the time:
    for validation while a model trains.

    `counts`: what was scored (`num_images`, `num_ground_truths` less crowds, `num_crowds`, `num_detections`) and what
    was not (`num_ignored_ground_truths`, `num_ignored_detections`). Of the scored detections, those beyond the last
    limit have no effect: `num_truncated_detections`.
    """
    truths, detections, num_ignored = scored_rows(tables, ignore_rule)
    num_classes = len(tables.class_ids)
    curves = (
        _curves_by_pycocotools(tables, truths, detections, rules)
        if by_pycocotools
        else curves_of(outcomes_of(truths, detections, rules.areas, rules.limits[-1]), num_classes, rules.limits)
    )
    num_by_class = np.bincount(truths.label[~truths.is_crowd], minlength=num_classes)
    place = ranks(detections, detections.image * num_classes + detections.label)
    counts = {
        "num_images": len(tables.image_ids),
        "num_ground_truths": int(num_by_class.sum()),
        "num_crowds": int(truths.is_crowd.sum()),
        "num_detections": len(detections.label),
        **num_ignored,
        "num_truncated_detections": int((place >= rules.limits[-1]).sum()),
    }
    return _read(curves, rules, tables.class_names, num_by_class, counts)


def scored_rows(tables: Tables, ignore_rule: IgnoreRule) -> tuple[TruthTable, DetectionTable, dict[str, int]]:
    """What the ignore rule leaves of both tables, and how many rows it takes out."""
    regions = tables.ignore_regions_xywh_px
    ignored_truths = in_ignore_regions(tables.truths, regions, ignore_rule) & ~tables.truths.is_crowd
    ignored_detections = in_ignore_regions(tables.detections, regions, ignore_rule)
    counts = {
        "num_ignored_ground_truths": int(ignored_truths.sum()),
        "num_ignored_detections": int(ignored_detections.sum()),
    }
    return tables.truths.take(~ignored_truths), tables.detections.take(~ignored_detections), counts


def _curves_by_pycocotools(tables: Tables, truths: TruthTable, detections: DetectionTable, rules: CocoRules) -> Curves:
    gt_entries = [
        # Ids from 1: pycocotools takes a match with annotation id 0 for no match.
        {"id": row, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": int(is_crowd)}
        for row, (image, label, box, area, is_crowd) in enumerate(_rows(truths), start=1)
    ]
    dt_entries = [
        {"id": row, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "score": score}
        for row, (image, label, box, score) in enumerate(_rows(detections), start=1)
    ]
    frame = {
        "images": [{"id": image} for image in range(len(tables.image_ids))],
        "categories": [{"id": label} for label in range(len(tables.class_ids))],
    }
    with _PRINTING, contextlib.redirect_stdout(io.StringIO()):
        indices = []
        # Not COCO.loadRes: it fails on an empty list.
        for entries in (gt_entries, dt_entries):
            index = COCO()
            index.dataset = {**frame, "annotations": entries}
            index.createIndex()
            indices.append(index)
        evaluator = COCOeval(*indices, iouType="bbox")
        evaluator.params.maxDets = list(rules.limits)
        evaluator.params.areaRng = [list(area) for area in rules.areas.values()]
        evaluator.params.areaRngLbl = list(rules.areas)
        evaluator.evaluate()
        evaluator.accumulate()
    # Of what it accumulates, AP is read at the last limit: `summarize()` would read it at 100 whatever was asked.
    return Curves(evaluator.eval["precision"][..., -1], evaluator.eval["recall"])


def _rows(table: TruthTable | DetectionTable) -> Any:
    return zip(*(column.tolist() for column in table), strict=True)


def _read(
    curves: Curves,
    rules: CocoRules,
    class_names: Sequence[str],
    num_by_class: NDArray[np.int64],
    counts: dict[str, int],
) -> Score:
    precision, recall = curves
    prefix, sizes = rules.prefix, list(enumerate(rules.areas))[1:]
    metrics = {
        f"{prefix}/AP": mean_of_known(precision[..., 0]),
        f"{prefix}/AP50": mean_of_known(precision[0, ..., 0]),
        f"{prefix}/AP75": mean_of_known(precision[5, ..., 0]),
    }
    metrics |= {f"{prefix}/AP_{size}": mean_of_known(precision[..., a]) for a, size in sizes}
    metrics |= {f"{prefix}/AR_{limit}": mean_of_known(recall[:, :, 0, m]) for m, limit in enumerate(rules.limits)}
    metrics |= {f"{prefix}/AR_{size}": mean_of_known(recall[:, :, a, -1]) for a, size in sizes}
    per_class: dict[str, dict[str, float | None]] = {
        name: {
            f"{prefix}/AP": mean_of_known(precision[:, :, label, 0]),
            f"{prefix}/AP50": mean_of_known(precision[0, :, label, 0]),
            f"{prefix}/AR": mean_of_known(recall[:, label, 0, -1]),
            "num_ground_truths": float(num_by_class[label]),
        }
        for label, name in enumerate(class_names)
    }
    at_50 = {name: precision[0, :, label, 0] for label, name in enumerate(class_names) if num_by_class[label]}
    return Score(metrics, per_class, counts, at_50)


def mean_of_known(values: NDArray[np.float64]) -> float | None:
    """Mean of all entries but -1, which stands for `no ground truth`; None where there is no other."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None

"""The COCO protocol. pycocotools computes every number; this file feeds it, silences it and reads it correctly."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.checks import check_detections, check_ground_truth
from evaluation.ignore import IgnoreRule, in_ignore_regions

RECALL_POINTS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)

_AREAS = ("all", "small", "medium", "large")
# redirect_stdout swaps a global: two threads inside it at once would leave the process silenced for good.
_PRINTING = threading.Lock()


class CocoScore(NamedTuple):
    """Score of one set of detections; None where there is no ground truth to score against.

    `metrics` by name (`coco/AP`); `per_class` by class name (`AP`, `AP50`, `AR`, `num_ground_truths`); `counts` as in
    `score`; `precision_at_50` by name of each class with ground truth: precision at `RECALL_POINTS` and IoU .50,
    float64 (101,).
    """

    metrics: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    counts: dict[str, int]
    precision_at_50: dict[str, NDArray[np.float64]]


def score(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    max_dets: int = 100,
    ignore_rule: IgnoreRule,
) -> CocoScore:
    """COCO metrics over **all** images of `ground_truth`, also those without detections or objects.

    `ground_truth` is a COCO dict; images may carry `ignore_regions_xywh`. Under `covered-half` a ground truth or
    detection with at least half of its own area in the union of its image's regions is dropped before scoring, and
    counted; crowd boxes stay. `max_dets` truncates per image and class; AP is read at `max_dets`.

    `counts`: what was scored (`num_images`, `num_ground_truths` less crowds, `num_crowds`, `num_detections`) and what
    was not (`num_ignored_ground_truths`, `num_ignored_detections`). Of the scored detections, those beyond `max_dets`
    have no effect: `num_truncated_detections`.

    Raises:
        BadGroundTruth: repeated image id, category id or class name; an annotation with an unknown image or category,
            or whose box is not finite or has no positive size.
        BadDetections: unknown image or category; a box that is not finite or has no positive size; a score that is
            missing or outside 0..1.
    """
    if max_dets < 1:
        raise ValueError(f"max_dets is {max_dets}; it must be at least 1")
    images, annotations = ground_truth["images"], ground_truth["annotations"]
    check_ground_truth(ground_truth)
    check_detections(detections, ground_truth)

    is_crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    ignored_gt = in_ignore_regions(annotations, images, ignore_rule) & ~is_crowd
    ignored_dt = in_ignore_regions(detections, images, ignore_rule)
    limits = [*(limit for limit in (1, 10) if limit < max_dets), max_dets]
    evaluator = run_pycocotools(ground_truth, detections, ~ignored_gt, ~ignored_dt, limits)

    num_by_category = Counter(
        annotations[row]["category_id"] for row in np.flatnonzero(~ignored_gt & ~is_crowd).tolist()
    )
    per_image_class = Counter(
        (detections[row]["image_id"], detections[row]["category_id"]) for row in np.flatnonzero(~ignored_dt).tolist()
    )
    counts = {
        "num_images": len(images),
        "num_ground_truths": num_by_category.total(),
        "num_crowds": int(is_crowd.sum()),
        "num_detections": int((~ignored_dt).sum()),
        "num_ignored_ground_truths": int(ignored_gt.sum()),
        "num_ignored_detections": int(ignored_dt.sum()),
        "num_truncated_detections": sum(max(0, n - max_dets) for n in per_image_class.values()),
    }
    return _read(evaluator, ground_truth["categories"], num_by_category, counts)


def run_pycocotools(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kept_annotations: NDArray[np.bool_],
    kept_detections: NDArray[np.bool_],
    max_dets: list[int],
) -> Any:
    """The accumulated `COCOeval` of the kept rows; their ids in it are row + 1."""
    # Ids of our own: pycocotools takes a match with annotation id 0 for no match, and loses repeated ids.
    gt_entries = [
        {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a, "id": row + 1}
        for row, a in enumerate(ground_truth["annotations"])
        if kept_annotations[row]
    ]
    dt_entries = [
        {**d, "id": row + 1, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]}
        for row, d in enumerate(detections)
        if kept_detections[row]
    ]
    with _PRINTING, contextlib.redirect_stdout(io.StringIO()):
        indices = []
        # Not COCO.loadRes: it fails on an empty list.
        for entries in (gt_entries, dt_entries):
            index = COCO()
            index.dataset = {**ground_truth, "annotations": entries}
            index.createIndex()
            indices.append(index)
        evaluator = COCOeval(*indices, iouType="bbox")
        evaluator.params.maxDets = max_dets
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _read(
    evaluator: Any, categories: Sequence[Mapping[str, Any]], num_by_category: Counter[int], counts: dict[str, int]
) -> CocoScore:
    """Metrics from the accumulated arrays, not from `summarize()`: that reads AP at maxDets 100 whatever was asked."""
    precision = evaluator.eval["precision"]  # (IoU T=10, recall 101, class K, area 4, maxDets M); -1 where no object
    recall = evaluator.eval["recall"]  # (T, K, area, M)
    metrics = {
        "coco/AP": _mean(precision[:, :, :, 0, -1]),
        "coco/AP50": _mean(precision[0, :, :, 0, -1]),
        "coco/AP75": _mean(precision[5, :, :, 0, -1]),
    }
    metrics |= {f"coco/AP_{area}": _mean(precision[:, :, :, a, -1]) for a, area in enumerate(_AREAS) if a}
    metrics |= {f"coco/AR_{limit}": _mean(recall[:, :, 0, m]) for m, limit in enumerate(evaluator.params.maxDets)}
    metrics |= {f"coco/AR_{area}": _mean(recall[:, :, a, -1]) for a, area in enumerate(_AREAS) if a}

    column = {category_id: k for k, category_id in enumerate(evaluator.params.catIds)}
    per_class: dict[str, dict[str, float | None]] = {}
    curves: dict[str, NDArray[np.float64]] = {}
    for category in categories:
        k, name = column[category["id"]], category["name"]
        per_class[name] = {
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "AR": _mean(recall[:, k, 0, -1]),
            "num_ground_truths": float(num_by_category[category["id"]]),
        }
        if num_by_category[category["id"]]:
            curves[name] = precision[0, :, k, 0, -1].copy()
    return CocoScore(metrics, per_class, counts, curves)


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None

"""Which detection found which object at IoU .50, by pycocotools' own matching: hits, misses and false positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.coco import run_pycocotools
from evaluation.ignore import IgnoreRule, in_ignore_regions


@dataclass
class ImageMatches:
    """Outcome for one image, as rows of the annotations and of the detections.

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
    images, annotations = ground_truth["images"], ground_truth["annotations"]
    is_crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    ignored_gt = in_ignore_regions(annotations, images, ignore_rule) & ~is_crowd
    ignored_dt = in_ignore_regions(detections, images, ignore_rule)
    confident = np.array([d["score"] >= score_threshold for d in detections], dtype=bool)

    matches = {image["id"]: ImageMatches(image["id"]) for image in images}
    for row in np.flatnonzero(ignored_gt | is_crowd).tolist():
        matches[annotations[row]["image_id"]].ignored_annotations.append(row)
    for row in np.flatnonzero(ignored_dt & confident).tolist():
        matches[detections[row]["image_id"]].ignored_detections.append(row)
    evaluator = run_pycocotools(
        ground_truth, detections, ~ignored_gt, ~ignored_dt & confident, [max(1, len(detections))]
    )
    all_areas = evaluator.params.areaRng[0]
    for entry in evaluator.evalImgs:
        if entry is None or entry["aRng"] != all_areas:
            continue
        found = matches[int(entry["image_id"])]
        for gt_id, dt_id, ignored in zip(entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"], strict=True):
            if dt_id and not ignored:
                found.hits.append((gt_id - 1, int(dt_id) - 1))
            elif not ignored:
                found.misses.append(gt_id - 1)
        for dt_id, gt_id, ignored in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True):
            if ignored:
                found.ignored_detections.append(dt_id - 1)
            elif not gt_id:
                found.false_positives.append(dt_id - 1)
    return list(matches.values())

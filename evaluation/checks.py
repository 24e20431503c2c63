"""What can be scored: the form of a detection, and every reason to refuse one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from numbers import Real
from reprlib import repr
from typing import Any, TypedDict

import numpy as np

MAX_LISTED = 20
# Of a coordinate: areas stay finite. As in `data.coco`.
MAX_NUMBER = 1e12


class BadDetections(ValueError):
    """Detections that cannot be scored; lists every problem, the first 20 in full."""


class BadGroundTruth(ValueError):
    """Ground truth that cannot be scored against; lists every problem, the first 20 in full."""


class CocoDetection(TypedDict):
    """One entry of a COCO results file; `bbox` is x, y, w, h in original-image pixels."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


def check_ground_truth(ground_truth: Mapping[str, Any]) -> None:
    """Raises BadGroundTruth: repeated ids or names, annotations of unknown image or category or without a real box."""
    images, categories = ground_truth["images"], ground_truth["categories"]
    problems = [
        f"{what} {value!r} occurs {count} times"
        for what, values in (
            ("image id", [image["id"] for image in images]),
            ("category id", [category["id"] for category in categories]),
            ("class name", [category["name"] for category in categories]),
        )
        for value, count in Counter(values).items()
        if count > 1
    ]
    if not _are_sound(ground_truth["annotations"], ground_truth):
        problems += _problems("annotation", ground_truth["annotations"], ground_truth)
    if problems:
        raise BadGroundTruth(listed(problems, len(problems)))


def check_detections(detections: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> None:
    """Raises BadDetections: unknown image or category, no real box, a score that is missing or outside 0..1."""
    if _are_sound(detections, ground_truth) and _are_scores([row.get("score") for row in detections]):
        return
    problems = _problems("detection", detections, ground_truth)
    problems += [
        f"detection {row}: score {repr(detection.get('score'))} is outside 0..1"
        for row, detection in enumerate(detections)
        if not _is_finite(detection.get("score")) or not 0.0 <= detection["score"] <= 1.0
    ]
    if problems:
        raise BadDetections(listed(problems, len(problems)))


def _are_sound(boxes: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> bool:
    """Whether there is nothing to look for, said in a hundredth of the time that looking takes."""
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    try:
        known = {row["image_id"] for row in boxes} <= image_ids and {
            row["category_id"] for row in boxes
        } <= category_ids
        xywh = np.array([row["bbox"] for row in boxes] or np.empty((0, 4)))
    except (KeyError, TypeError, ValueError):
        return False
    if not known or xywh.dtype.kind not in "iuf" or xywh.ndim != 2 or xywh.shape[1] != 4:
        return False
    return bool((np.abs(xywh) <= MAX_NUMBER).all() and (xywh[:, 2:] > 0).all())


def _are_scores(values: Sequence[object]) -> bool:
    try:
        scores = np.array(values or np.empty(0))
    except ValueError:
        return False
    return scores.dtype.kind in "iuf" and bool(((scores >= 0) & (scores <= 1)).all())


def _problems(what: str, boxes: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> list[str]:
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    problems = []
    for row, box in enumerate(boxes):
        if not _is_one_of(box.get("image_id"), image_ids):
            problems.append(f"{what} {row}: image_id {repr(box.get('image_id'))} is not in the ground truth")
        if not _is_one_of(box.get("category_id"), category_ids):
            problems.append(
                f"{what} {row}: category_id {repr(box.get('category_id'))} is not one of {sorted(category_ids)}; "
                "it is the label (from 0) plus 1"
            )
        xywh = box.get("bbox", ())
        if not _are_four_numbers(xywh):
            problems.append(f"{what} {row}: bbox {repr(xywh)} must be four finite numbers x, y, w, h")
        elif xywh[2] <= 0 or xywh[3] <= 0:
            problems.append(f"{what} {row}: bbox {list(xywh)} must have w > 0 and h > 0")
    return problems


def _is_one_of(value: object, known: Set[object]) -> bool:
    return isinstance(value, Hashable) and value in known


def _are_four_numbers(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 4 and all(map(_is_finite, value))


def _is_finite(value: object) -> bool:
    # Not math.isfinite: it fails on integers that no float holds.
    return isinstance(value, Real) and bool(abs(value) <= MAX_NUMBER)  # type: ignore[operator]


def listed(problems: Sequence[str], num_problems: int) -> str:
    """Return the first MAX_LISTED problems, one a line, with how many there are; `problems` may hold these alone."""
    more = f"\n  ... and {num_problems - MAX_LISTED} more" if num_problems > MAX_LISTED else ""
    return f"{num_problems} problem(s):\n  " + "\n  ".join(problems[:MAX_LISTED]) + more

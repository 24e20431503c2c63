"""What can be scored: the form of a detection, and every reason to refuse one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from reprlib import repr
from typing import Any, TypedDict

import numpy as np

MAX_LISTED = 20
# Of a coordinate: areas stay finite. As in `data.coco`.
MAX_NUMBER = 1e12
# Numbers to Python and to an array, but not to a reader of JSON.
_BOOLEANS = {bool, np.bool_}


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
    problems = [
        problem
        for what, key in (("images", "id"), ("categories", "id"), ("categories", "name"))
        for problem in repetitions(what, ground_truth[what], key)
    ]
    if not _are_sound(ground_truth["annotations"], ground_truth):
        problems += _problems("annotation", ground_truth["annotations"], ground_truth)
    if problems:
        raise BadGroundTruth(listed(problems, len(problems)))


def check_detections(detections: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> None:
    """Raises BadDetections: unknown image or category, no real box, a score that is no number in 0..1; no booleans."""
    if _are_sound(detections, ground_truth) and _are_scores([row.get("score") for row in detections]):
        return
    problems = _problems("detection", detections, ground_truth)
    problems += [
        f"detection {row}: score {repr(detection.get('score'))} is no number in 0..1"
        for row, detection in enumerate(detections)
        if not _is_finite(detection.get("score")) or not 0.0 <= detection["score"] <= 1.0
    ]
    if problems:
        raise BadDetections(listed(problems, len(problems)))


def repetitions(what: str, rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Name each row whose value of `key` an earlier one has, with that one; rows without the key are left out."""
    first: dict[object, int] = {}
    return [
        f"{what}[{row}]: {key} {repr(fields[key])} was used by {what}[{first[fields[key]]}]; give each its own"
        for row, fields in enumerate(rows)
        if key in fields and first.setdefault(fields[key], row) != row
    ]


def _are_sound(boxes: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> bool:
    """Whether there is nothing to look for, said in a hundredth of the time that looking takes."""
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    try:
        of_images, of_categories = [row["image_id"] for row in boxes], [row["category_id"] for row in boxes]
        known = set(of_images) <= image_ids and set(of_categories) <= category_ids
        # To a set, 1.0 and True are 1.
        known = known and all(map(_is_whole_type, _types(of_images) | _types(of_categories)))
        xywh = np.array([row["bbox"] for row in boxes] or np.empty((0, 4)))
    except (KeyError, TypeError, ValueError):
        return False
    if not known or xywh.dtype.kind not in "iuf" or xywh.ndim != 2 or xywh.shape[1] != 4:
        return False
    if _BOOLEANS & _types(chain.from_iterable(row["bbox"] for row in boxes)):
        return False
    return bool((np.abs(xywh) <= MAX_NUMBER).all() and (xywh[:, 2:] > 0).all())


def _are_scores(values: Sequence[object]) -> bool:
    try:
        scores = np.array(values or np.empty(0))
    except ValueError:
        return False
    is_number = scores.dtype.kind in "iuf" and not _BOOLEANS & _types(values)
    return is_number and bool(((scores >= 0) & (scores <= 1)).all())


def _types(values: Iterable[object]) -> set[type]:
    return set(map(type, values))


def _is_whole_type(kind: type) -> bool:
    return issubclass(kind, Integral) and kind not in _BOOLEANS


def _problems(what: str, boxes: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> list[str]:
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    ids = (
        ("image_id", image_ids, "is not in the ground truth"),
        ("category_id", category_ids, f"is not in the ground truth; known: {some(sorted(category_ids))}"),
    )
    problems = []
    for row, box in enumerate(boxes):
        for key, known, rule in ids:
            value = box.get(key)
            if not _is_whole_type(type(value)):
                problems.append(f"{what} {row}: {key} {repr(value)} must be a whole number: 1, not 1.0, true or '1'")
            elif value not in known:
                problems.append(f"{what} {row}: {key} {repr(value)} {rule}")
        xywh = box.get("bbox", ())
        if not _are_four_numbers(xywh):
            problems.append(f"{what} {row}: bbox {repr(xywh)} must be four finite numbers x, y, w, h")
        elif xywh[2] <= 0 or xywh[3] <= 0:
            problems.append(f"{what} {row}: bbox {list(xywh)} must have w > 0 and h > 0")
    return problems


def _are_four_numbers(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 4 and all(map(_is_finite, value))


def _is_finite(value: object) -> bool:
    # Not math.isfinite: it fails on integers that no float holds.
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(abs(value) <= MAX_NUMBER)  # type: ignore[arg-type]


def some(values: Sequence[object]) -> str:
    """Return the first MAX_LISTED values between commas, and how many more there are; `none` of none."""
    more = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return (", ".join(map(str, values[:MAX_LISTED])) or "none") + more


def listed(problems: Sequence[str], num_problems: int) -> str:
    """Return the first MAX_LISTED problems, one a line, with how many there are; `problems` may hold these alone."""
    more = f"\n  ... and {num_problems - MAX_LISTED} more" if num_problems > MAX_LISTED else ""
    return f"{num_problems} problem(s):\n  " + "\n  ".join(problems[:MAX_LISTED]) + more

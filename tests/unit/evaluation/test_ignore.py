"""Ignore regions: exact coverage, and what dropping does to the score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluation.coco import score
from evaluation.ignore import covered_area_px, covered_by_half


@pytest.mark.parametrize("seed", range(5))
def test_covered_area_equals_counting_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    regions = np.concatenate([rng.integers(0, 40, (6, 2)), rng.integers(1, 25, (6, 2))], axis=1).astype(float)
    boxes = np.concatenate([rng.integers(0, 50, (40, 2)), rng.integers(1, 20, (40, 2))], axis=1).astype(float)
    mask = np.zeros((80, 80), dtype=bool)
    for x, y, w, h in regions.astype(int):
        mask[y : y + h, x : x + w] = True
    counted = [mask[y : y + h, x : x + w].sum() for x, y, w, h in boxes.astype(int)]
    np.testing.assert_array_equal(covered_area_px(boxes, regions), counted)
    # The same at a scale where coordinates are not binary fractions.
    np.testing.assert_allclose(covered_area_px(boxes * 0.1, regions * 0.1), np.array(counted) * 0.01, atol=1e-12)


@pytest.mark.parametrize("unit", [1.0, 0.1, 1 / 3])
def test_exactly_half_is_covered(unit: float) -> None:
    boxes = np.array([[0, 0, 10, 10], [3, 3, 14, 10]]) * unit
    assert covered_by_half(boxes, np.array([[-5, -5, 10, 30], [0, 0, 10, 40]]) * unit).tolist() == [True, True]
    assert covered_by_half(boxes, np.array([[-5, -5, 9.999, 30]]) * unit).tolist() == [False, False]


def test_overlapping_regions_count_once() -> None:
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    assert covered_area_px(box, np.array([[0.0, 0, 4, 10], [0.0, 0, 4, 10], [2.0, 0, 2, 10]])).tolist() == [40.0]
    assert covered_area_px(box, np.zeros((0, 4))).tolist() == [0.0]
    assert covered_area_px(box, np.array([[5.0, 0.0, 0.0, 10.0]])).tolist() == [0.0]


def _scene(**annotation: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "ignore_regions_xywh": [[100, 100, 100, 100]]}, {"id": 2}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]},
            {"image_id": 1, "category_id": 1, "bbox": [90, 100, 20, 20], **annotation},
        ],
    }


def _detection(image_id: int, x: float, y: float, confidence: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": [x, y, 20, 20], "score": confidence}


def test_boxes_in_a_region_are_neither_right_nor_wrong() -> None:
    found = [_detection(1, 10, 10, 0.5), _detection(1, 150, 150, 0.9), _detection(1, 190, 120, 0.9)]
    scored = score(_scene(), found, ignore_rule="covered-half")
    assert scored.metrics["coco/AP"] == pytest.approx(1.0)
    assert scored.counts["num_ground_truths"] == 1
    assert scored.counts["num_ignored_ground_truths"] == 1
    assert scored.counts["num_detections"] == 1
    assert scored.counts["num_ignored_detections"] == 2
    # Without the rule: recall 1/2 at precision 1/3, which covers 51 of the 101 recall points.
    assert score(_scene(), found, ignore_rule="none").metrics["coco/AP"] == pytest.approx(51 / 101 / 3)


def test_a_region_belongs_to_its_image() -> None:
    found = [_detection(1, 10, 10, 0.5), _detection(2, 150, 150, 0.9)]
    assert score(_scene(), found, ignore_rule="covered-half").metrics["coco/AP"] == pytest.approx(1 / 2)


def test_a_box_less_than_half_inside_is_scored() -> None:
    found = [_detection(1, 10, 10, 0.5), _detection(1, 89.9, 150, 0.9)]
    scored = score(_scene(), found, ignore_rule="covered-half")
    assert scored.counts["num_ignored_detections"] == 0
    assert scored.metrics["coco/AP"] == pytest.approx(1 / 2)


def test_crowds_stay() -> None:
    crowd = _scene(iscrowd=1)
    # Inside the crowd box, outside the region: forgiven only because the crowd is still there.
    found = [_detection(1, 10, 10, 0.5), {**_detection(1, 90, 100, 0.9), "bbox": [90, 100, 9, 20]}]
    scored = score(crowd, found, ignore_rule="covered-half")
    assert scored.metrics["coco/AP"] == pytest.approx(1.0)
    assert scored.counts["num_crowds"] == 1
    assert scored.counts["num_ignored_ground_truths"] == 0

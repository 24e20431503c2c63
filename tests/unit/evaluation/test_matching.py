from __future__ import annotations

from typing import Any

from evaluation.matching import match

TRUTH: dict[str, Any] = {
    "images": [{"id": 5, "ignore_regions_xywh": [[200, 200, 50, 50]]}, {"id": 3}],
    "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
    "annotations": [
        {"image_id": 5, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"image_id": 5, "category_id": 1, "bbox": [50, 0, 10, 10]},
        {"image_id": 5, "category_id": 2, "bbox": [100, 0, 10, 10]},
        {"image_id": 5, "category_id": 1, "bbox": [210, 210, 10, 10]},
        {"image_id": 5, "category_id": 1, "bbox": [0, 100, 100, 100], "iscrowd": 1},
    ],
}
DETECTIONS = [
    {"image_id": 5, "category_id": 1, "bbox": [0, 0, 10, 9], "score": 0.9},  # hits object 0
    {"image_id": 5, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.8},  # fits better, but comes second
    {"image_id": 5, "category_id": 1, "bbox": [50, 0, 10, 10], "score": 0.2},  # below the threshold
    {"image_id": 5, "category_id": 1, "bbox": [100, 0, 10, 10], "score": 0.7},  # a bus taken for a car
    {"image_id": 5, "category_id": 1, "bbox": [212, 212, 10, 10], "score": 0.7},  # in the ignore region
    {"image_id": 5, "category_id": 1, "bbox": [20, 120, 10, 10], "score": 0.7},  # in the crowd
]


def test_every_box_has_one_outcome() -> None:
    first, empty = match(TRUTH, DETECTIONS, ignore_rule="covered-half", score_threshold=0.5)
    assert first.image_id == 5
    assert first.hits == [(0, 0)]
    assert first.misses == [1, 2]
    assert sorted(first.false_positives) == [1, 3]
    assert sorted(first.ignored_annotations) == [3, 4]
    assert sorted(first.ignored_detections) == [4, 5]
    assert first.f1 == 2 / (2 + 2 + 2)
    assert empty.image_id == 3
    assert empty.f1 is None


def test_threshold_is_inclusive_and_nothing_is_needed() -> None:
    assert match(TRUTH, DETECTIONS, ignore_rule="none", score_threshold=0.2)[0].hits == [(0, 0), (1, 2)]
    nothing = match(TRUTH, [], ignore_rule="covered-half", score_threshold=0.2)[0]
    assert nothing.misses == [0, 1, 2]
    assert nothing.f1 == 0.0

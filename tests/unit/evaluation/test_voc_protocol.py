"""VOC's mAP50 against cases with a known answer and a plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.tables import Tables, tabulate
from evaluation.voc import average_precision, score_voc, voc_outcomes


def iou(one: NDArray[Any], other: NDArray[Any]) -> float:
    w, h = np.minimum(one[:2] + one[2:], other[:2] + other[2:]) - np.maximum(one[:2], other[:2])
    overlap = max(w, 0) * max(h, 0)
    return float(overlap / (one[2] * one[3] + other[2] * other[3] - overlap))


def plain_ap(tables: Tables, label: int) -> float | None:
    truths, found = tables.truths, tables.detections
    objects = [row for row in range(len(truths.label)) if truths.label[row] == label]
    num_truths = sum(not truths.is_crowd[row] for row in objects)
    if num_truths == 0:
        return None
    rows = [row for row in range(len(found.label)) if found.label[row] == label]
    used: set[int] = set()
    hits = []
    for row in sorted(rows, key=lambda row: (-found.scores[row], found.image[row], row)):
        best, place = -1.0, -1
        for g in objects:
            overlap = iou(found.boxes_xywh_px[row], truths.boxes_xywh_px[g])
            if truths.image[g] == found.image[row] and overlap > best:
                best, place = overlap, g
        if best < 0.5:
            hits.append(False)
        elif not truths.is_crowd[place]:
            hits.append(place not in used)
            used.add(place)
    recall = np.concatenate([[0], np.cumsum(hits) / num_truths, [1]])
    precision = np.concatenate([[0], np.cumsum(hits) / np.arange(1, len(hits) + 1), [0]])
    for k in range(len(precision) - 2, -1, -1):
        precision[k] = max(precision[k], precision[k + 1])
    return float(sum((recall[k] - recall[k - 1]) * precision[k] for k in range(1, len(recall))))


def random_tables(seed: int) -> Tables:
    rng = np.random.default_rng(seed)
    annotations, found = [], []
    for image in range(1, 7):
        for _ in range(int(rng.integers(0, 9))):
            box = [*rng.integers(0, 60, 2), *rng.integers(8, 40, 2)]
            category, is_crowd = int(rng.integers(1, 4)), int(rng.random() < 0.2)
            annotations.append({"image_id": image, "category_id": category, "bbox": box, "iscrowd": is_crowd})
            for _ in range(int(rng.integers(0, 4))):
                shifted = np.maximum(np.array(box) + rng.integers(-6, 7, 4), [-50, -50, 4, 4])
                guessed = category if rng.random() < 0.8 else int(rng.integers(1, 4))
                score = int(rng.integers(0, 10)) / 10
                found.append({"image_id": image, "category_id": guessed, "bbox": shifted.tolist(), "score": score})
    categories = [{"id": c, "name": f"class-{c}"} for c in range(1, 5)]
    images = [{"id": image} for image in range(1, 7)]
    return tabulate({"images": images, "categories": categories, "annotations": annotations}, found)


@pytest.mark.parametrize("seed", range(30))
def test_equals_plain_loops(seed: int) -> None:
    tables = random_tables(seed)
    scored = score_voc(tables, ignore_rule="none")
    expected = {name: plain_ap(tables, label) for label, name in enumerate(tables.class_names)}
    assert {name: values["voc/AP50"] for name, values in scored.per_class.items()} == pytest.approx(expected, abs=1e-12)
    known = [value for value in expected.values() if value is not None]
    assert scored.metrics["voc/mAP50"] == pytest.approx(np.mean(known), abs=1e-12)
    assert scored.per_class["class-4"]["voc/AP50"] is None


def two(first: list[float], second: list[float], *, difficult: int = 0) -> dict[str, Any]:
    return {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "crack"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": first},
            {"image_id": 1, "category_id": 1, "bbox": second, "iscrowd": difficult},
        ],
    }


def test_a_detection_has_no_second_choice() -> None:
    # Both detections overlap the first object most, and the second object by more than one half.
    truth = two([0, 0, 10, 10], [2, 0, 10, 10])
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": s} for s in (0.9, 0.8)]
    tables = tabulate(truth, found)
    assert score_voc(tables, ignore_rule="none").metrics["voc/mAP50"] == 0.5
    outcomes = voc_outcomes(tables.truths, tables.detections)
    assert outcomes.is_hit.tolist() == [True, False]


def test_detections_on_a_difficult_object_count_neither_way_and_its_iou_is_the_usual_one() -> None:
    truth = two([50, 50, 10, 10], [0, 0, 40, 40], difficult=1)
    right = {"image_id": 1, "category_id": 1, "bbox": [50, 50, 10, 10], "score": 0.5}
    for bbox, ap in (([0, 0, 40, 36], 1.0), ([0, 0, 10, 10], 0.5)):
        found = [{"image_id": 1, "category_id": 1, "bbox": bbox, "score": 0.9}, right]
        scored = score_voc(tabulate(truth, found), ignore_rule="none")
        assert scored.metrics["voc/mAP50"] == ap
        assert (scored.counts["num_ground_truths"], scored.counts["num_crowds"]) == (1, 1)


@pytest.mark.parametrize(("difficult_first", "is_hit", "is_counted"), [(False, True, True), (True, False, False)])
def test_of_equal_overlaps_the_first_object_is_the_detection_s(
    difficult_first: bool, is_hit: bool, is_counted: bool
) -> None:
    truth = two([0, 0, 10, 10], [4, 0, 10, 10], difficult=1)
    if difficult_first:
        truth["annotations"].reverse()
    # In the middle: IoU 2/3 with both.
    tables = tabulate(truth, [{"image_id": 1, "category_id": 1, "bbox": [2, 0, 10, 10], "score": 0.9}])
    outcomes = voc_outcomes(tables.truths, tables.detections)
    assert (outcomes.is_hit.tolist(), outcomes.is_counted.tolist()) == ([is_hit], [is_counted])


def test_the_area_under_the_curve_by_hand() -> None:
    hits = np.array([True, False, True, False])
    assert average_precision(hits, np.ones(4, bool), 2) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert average_precision(hits, np.array([True, False, True, True]), 4) == 0.5
    assert average_precision(np.zeros(0, bool), np.zeros(0, bool), 3) == 0.0
    assert average_precision(hits, hits, 0) is None

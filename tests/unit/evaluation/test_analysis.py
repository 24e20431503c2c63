"""Operating point, confusion, recall by size, reliability and inspection: by hand, and against loops over lists."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from plain_analysis import PlainAnalysis
from pydantic import TypeAdapter
from scenes import Box, Scene, make_scene, random_scene, scenes

from evaluation.analysis import analyse
from evaluation.analysis_records import (
    SIZES_PX,
    UNKNOWN_THRESHOLD,
    Analysis,
    IgnoredHits,
    Inspection,
    InspectionPoint,
    OperatingPoint,
    Threshold,
)
from evaluation.tables import tabulate

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
A, B, C = [100.0, 0.0, 10.0, 10.0], [120.0, 0.0, 10.0, 10.0], [140.0, 0.0, 10.0, 10.0]
NOWHERE = [200.0, 200.0, 9.0, 9.0]


def analysis_of(scene: Scene, max_dets: int = 100, operating_point: OperatingPoint | None = None) -> Analysis:
    return analyse(
        tabulate(*scene),
        ignore_rule="covered-half",
        max_dets=max_dets,
        operating_point=operating_point,
        chosen_on="val",
    )


def small_scene(objects: list[tuple[int, Box]], found: list[tuple[int, Box, float]], num_classes: int = 2) -> Analysis:
    """One image; objects and detections without its id."""
    return analysis_of(
        make_scene(
            [(1, label, box, False) for label, box in objects],
            [(1, label, box, score) for label, box, score in found],
            num_images=1,
            num_classes=num_classes,
        )
    )


def test_operating_point_by_hand() -> None:
    """Down the scores, F1 of class 1: 2/3, 1/2, 4/5; of class 2: 1; of both: 1/2, 4/5, 2/3, 6/7."""
    found = [(1, A, 0.9), (2, C, 0.85), (1, NOWHERE, 0.5), (1, B, 0.4)]
    point = small_scene([(1, A), (1, B), (2, C)], found, num_classes=3).operating_point
    assert point.overall == Threshold(0.4, precision=3 / 4, recall=1.0, f1=6 / 7)
    assert point.per_class == {
        "class-1": Threshold(0.4, precision=2 / 3, recall=1.0, f1=4 / 5),
        "class-2": Threshold(0.85, precision=1.0, recall=1.0, f1=1.0),
        "class-3": None,
    }


def test_of_equal_f1_the_higher_threshold_and_equal_scores_count_together() -> None:
    """F1 is 2/3 after the first detection, 1/2 after the second and 2/3 again after the fourth."""
    found = [(1, A, 0.9), (1, NOWHERE, 0.8), (1, NOWHERE, 0.8), (1, B, 0.7)]
    overall = small_scene([(1, A), (1, B)], found).operating_point.overall
    assert overall == Threshold(0.9, precision=1.0, recall=1 / 2, f1=2 / 3)
    # The hit cannot be had without its equal.
    overall = small_scene([(1, A)], [(1, A, 0.5), (1, NOWHERE, 0.5)]).operating_point.overall
    assert overall == Threshold(0.5, precision=1 / 2, recall=1.0, f1=2 / 3)


@pytest.mark.parametrize(("objects", "found"), [([], [(1, A, 0.9)]), ([(1, A)], []), ([(1, A)], [(1, B, 0.9)])])
def test_without_a_hit_there_is_no_operating_point_and_a_stated_score_is_looked_at(
    objects: list[tuple[int, Box]], found: list[tuple[int, Box, float]]
) -> None:
    analysis = small_scene(objects, found)
    assert analysis.operating_point == OperatingPoint(None, {"class-1": None, "class-2": None})
    assert analysis.inspection.at_operating_point.threshold == UNKNOWN_THRESHOLD
    assert len(analysis.inspection.curve) == 101
    assert analysis.confusion.counts == [[0, 0, len(objects)], [0, 0, 0], [len(found), 0, 0]]
    assert small_scene(objects, [(1, C, 0.2)]).confusion.counts[2][0] == 0


def test_test_is_judged_at_the_thresholds_of_val() -> None:
    val = small_scene([(1, A), (2, C)], [(1, A, 0.6), (2, C, 0.8)])
    objects, found = [(1, 1, A, False), (1, 1, B, False)], [(1, 1, A, 0.7), (1, 1, B, 0.5), (1, 2, C, 0.65)]
    stored = TypeAdapter(OperatingPoint).validate_json(json.dumps(asdict(val.operating_point)))
    assert stored == val.operating_point
    test = analysis_of(make_scene(objects, found, num_images=1, num_classes=2), operating_point=stored)
    assert test.operating_point == OperatingPoint(
        Threshold(0.6, precision=1 / 2, recall=1 / 2, f1=1 / 2),
        {"class-1": Threshold(0.6, precision=1.0, recall=1 / 2, f1=2 / 3), "class-2": Threshold(0.8, None, None, None)},
    )
    assert test.inspection.at_operating_point.threshold == 0.6
    # Parts without any defect: there is nothing to recall, yet overkill at val's threshold can be told.
    good = analysis_of(make_scene([], found, num_images=2, num_classes=2), operating_point=stored)
    assert good.operating_point.overall == Threshold(0.6, None, None, None)
    assert good.inspection.at_operating_point == InspectionPoint(0.6, None, 1 / 2, 1.0)


def test_confusion_by_hand() -> None:
    """Class 2 on A scores higher, but its own class takes A first; then class 2 is left with B."""
    between = [102.0, 0.0, 10.0, 10.0]
    confusion = small_scene([(1, A), (1, [104.0, 0.0, 10.0, 10.0])], [(2, between, 0.9), (1, A, 0.8)]).confusion
    assert confusion.class_names == ("class-1", "class-2")
    assert confusion.counts == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    # Used once: the second of class 2 is on no object.
    confusion = small_scene([(1, A), (1, B)], [(2, A, 0.9), (2, A, 0.8), (1, B, 0.8)]).confusion
    assert confusion.counts == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_recall_of_objects_on_a_bound_is_that_of_the_larger_size() -> None:
    objects = [(1, [100.0, 100.0 * row, side, side]) for row, side in enumerate([7.0, 8.0, 16.0, 32.0, 64.0])]
    analysis = small_scene(objects, [(1, box, 0.9) for _, box in objects[1:]], num_classes=1)
    assert [size.size for size in analysis.recall_by_size] == list(SIZES_PX)
    assert [(s.num_objects, s.num_found, s.num_found_at_threshold) for s in analysis.recall_by_size] == [
        (1, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1),
    ]  # fmt: skip


def test_reliability_by_hand() -> None:
    """Of the floor's own bin on; gaps of .8 - 1/2 in two, 1 - 1 in one and .05 - 0 in one detection."""
    found = [(1, A, 0.8), (1, NOWHERE, 0.8), (1, B, 1.0), (1, NOWHERE, 0.05), (1, NOWHERE, 0.04)]
    reliability = small_scene([(1, A), (1, B)], found).reliability
    filled = {(b.low, b.high): (b.num_detections, b.mean_score, b.precision) for b in reliability.bins}
    assert filled.pop((0.05, 0.1)) == (1, 0.05, 0.0)
    assert filled.pop((0.8, 0.9)) == (2, 0.8, 0.5)
    assert filled.pop((0.9, 1.0)) == (1, 1.0, 1.0)
    assert set(filled.values()) == {(0, None, None)}
    assert [b.low for b in reliability.bins[1:]] == [b.high for b in reliability.bins[:-1]]
    assert reliability.expected_calibration_error == pytest.approx((2 * 0.3 + 0 + 0.05) / 4)
    assert small_scene([(1, A)], [(1, A, 0.04)]).reliability.expected_calibration_error is None


def test_inspection_by_hand() -> None:
    """With an object: image 2, found; 3, with nothing but a box on a crowd; 4, with a box elsewhere, which is enough.
    Without: 5, and 6 with two boxes. Not known to be good: 1, whose object is ignored, and 7, a crowd.
    """
    crowd, in_region = [300.0, 0.0, 50.0, 50.0], [5.0, 5.0, 9.0, 9.0]
    things = {1: [in_region], 2: [A], 3: [A, crowd], 4: [A], 7: [crowd]}
    objects = [(image, 1, box, box == crowd) for image, boxes in things.items() for box in boxes]
    boxes = {2: [A], 3: [[310.0, 5.0, 9.0, 9.0]], 4: [NOWHERE], 6: [NOWHERE, NOWHERE], 7: [NOWHERE], 1: [NOWHERE]}
    found = [(image, 1, box, 0.9 + 0.05 * i) for image, reported in boxes.items() for i, box in enumerate(reported)]
    inspection = analysis_of(make_scene(objects, found, num_images=7, num_classes=1)).inspection
    expected = InspectionPoint(0.9, escape_rate=1 / 3, overkill_rate=1 / 2, false_positives_per_clean_image=1.0)
    assert (inspection.num_images_with_objects, inspection.num_images_without) == (3, 2)
    assert inspection.at_operating_point == expected
    assert inspection.curve[90] == expected
    assert inspection.curve[91] == InspectionPoint(0.91, 1.0, 1 / 2, 1 / 2)
    assert inspection.curve[0].threshold == 0.0
    assert inspection.curve[100] == InspectionPoint(1.0, 1.0, 0.0, 0.0)


def _check_inspection(inspection: Inspection, plain: PlainAnalysis) -> None:
    with_objects = {o.image for o in plain.objects}
    clean = set(range(plain.num_images)) - plain.annotated
    assert (inspection.num_images_with_objects, inspection.num_images_without) == (len(with_objects), len(clean))
    points = [*inspection.curve, inspection.at_operating_point]
    for point in points:
        reported = [d.image for d in plain.detections if d.score >= point.threshold]
        escaped, stopped = with_objects - set(reported), clean & set(reported)
        assert point.escape_rate == (len(escaped) / len(with_objects) if with_objects else None)
        assert point.overkill_rate == (len(stopped) / len(clean) if clean else None)
        on_clean = sum(image in clean for image in reported)
        assert point.false_positives_per_clean_image == (on_clean / len(clean) if clean else None)
    assert [point.threshold for point in inspection.curve] == [percent / 100 for percent in range(101)]
    for lower, higher in pairwise(inspection.curve):
        if with_objects:
            assert lower.escape_rate <= higher.escape_rate
        if clean:
            assert lower.overkill_rate >= higher.overkill_rate
            assert lower.false_positives_per_clean_image >= higher.false_positives_per_clean_image


def _compare(scene: Scene, max_dets: int) -> None:
    plain, analysis = PlainAnalysis(*scene, max_dets), analysis_of(scene, max_dets)
    thresholds = [analysis.operating_point.overall, *analysis.operating_point.per_class.values()]
    expected = [plain.threshold(label) for label in (None, *range(plain.num_classes))]
    for threshold, values in zip(thresholds, expected, strict=True):
        assert (threshold and tuple(asdict(threshold).values())) == (values and pytest.approx(values, abs=1e-12))
    threshold = expected[0][0] if expected[0] else UNKNOWN_THRESHOLD

    counts = analysis.confusion.counts
    assert counts == plain.confusion(threshold)
    for label in range(plain.num_classes):
        assert sum(counts[label]) == sum(o.label == label for o in plain.objects)
        assert counts[label][label] == sum(o.label == label and o.found_at >= threshold for o in plain.objects)
        assert sum(row[label] for row in counts) == sum(
            d.label == label and d.score >= threshold for d in plain.detections
        )

    for size in analysis.recall_by_size:
        low, high = SIZES_PX[size.size]
        inside = [o for o in plain.objects if low <= o.area**0.5 < high]
        for label, name in enumerate(size.per_class):
            own = [o.found_at for o in inside if o.label == label]
            assert size.per_class[name] == (len(own), sum(at >= 0 for at in own), sum(at >= threshold for at in own))
        totals = [sum(column) for column in zip(*size.per_class.values(), strict=True)]
        assert [size.num_objects, size.num_found, size.num_found_at_threshold] == totals

    gaps = 0.0
    for place, b in enumerate(analysis.reliability.bins):
        high = 2.0 if place == len(analysis.reliability.bins) - 1 else b.high
        hits = [(d.score, d.hit is not None) for d in plain.detections if b.low <= d.score < high]
        assert b.num_detections == len(hits)
        if hits:
            score, precision = (sum(column) / len(hits) for column in zip(*hits, strict=True))
            assert (b.mean_score, b.precision) == pytest.approx((score, precision), abs=1e-12)
            gaps += len(hits) * abs(score - precision)
    num = sum(b.num_detections for b in analysis.reliability.bins)
    assert analysis.reliability.expected_calibration_error == (pytest.approx(gaps / num, abs=1e-12) if num else None)

    _check_inspection(analysis.inspection, plain)
    ignored = [sum(score >= threshold for score in scores) for scores in (plain.ignored_scores, plain.crowd_scores)]
    assert analysis.ignored_hits == IgnoredHits(*ignored)
    # Plain values only, and no NaN: it is to be a JSON file.
    assert TypeAdapter(Analysis).validate_json(json.dumps(asdict(analysis), allow_nan=False)) == analysis


@pytest.mark.parametrize("seed", range(6))
def test_equals_loops_over_the_definitions(seed: int) -> None:
    _compare(random_scene(seed), 100)
    _compare(random_scene(seed), 4)


@settings(deadline=None)
@given(scenes())
def test_equals_them_on_any_small_scene(scene: Scene) -> None:
    _compare(scene, 2)


def test_max_dets_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_dets is 0"):
        analysis_of(random_scene(0), max_dets=0)


def test_the_fixture_of_the_coco_api() -> None:
    folder = SHARED / "coco_eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the COCO API's evaluation fixture is not part of the project")
    truth: dict[str, Any] = json.loads((folder / "dataset/cocoapi/instances_val2014_100.json").read_text())
    found = json.loads((folder / "cocoapi_results/instances_val2014_fakebbox100_results.json").read_text())
    analysis = analyse(tabulate(truth, found), ignore_rule="none", max_dets=100, chosen_on="val")
    assert f"{analysis.error_types.ap50:.3f}" == "0.697"
    num_objects = sum(not annotation["iscrowd"] for annotation in truth["annotations"])
    assert sum(map(sum, analysis.confusion.counts[:-1])) == num_objects
    assert sum(size.num_objects for size in analysis.recall_by_size) == num_objects

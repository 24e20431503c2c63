"""The fast way to COCO's numbers against pycocotools, and the matching underneath against plain loops."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import detection, ground_truth, random_set

from evaluation.coco import CocoRules, aitod_rules, coco_rules, score_tables
from evaluation.matching import NOT_MATCHED, match_greedily, overlapping, ranks
from evaluation.score import Score
from evaluation.tables import tabulate

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))


def assert_both_ways_agree(
    truth: dict[str, Any], found: list[dict[str, Any]], rules: CocoRules, ignore_rule: Any = "none"
) -> None:
    tables = tabulate(truth, found)
    reference, fast = (score_tables(tables, rules, ignore_rule=ignore_rule, by_pycocotools=by) for by in (True, False))
    assert fast.counts == reference.counts
    assert _flat(fast).keys() == _flat(reference).keys()
    for name, value in _flat(reference).items():
        other = _flat(fast)[name]
        assert (value is None) == (other is None), name
        assert value is None or other == pytest.approx(value, abs=1e-9), name
    for name, curve in reference.precision_at_50.items():
        np.testing.assert_allclose(fast.precision_at_50[name], curve, atol=1e-9)


def _flat(score: Score) -> dict[str, float | None]:
    return score.metrics | {
        f"{label}/{name}": value for label, row in score.per_class.items() for name, value in row.items()
    }


@pytest.mark.parametrize("rules", [*map(coco_rules, (1, 7, 100, 500)), aitod_rules()], ids=lambda r: f"{r[0]}-{r[2]}")
@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed: int, rules: CocoRules) -> None:
    assert_both_ways_agree(*random_set(seed), rules)


def test_equals_pycocotools_where_hundreds_are_detected_with_few_scores() -> None:
    truth, _ = random_set(3)
    rng = np.random.default_rng(0)
    found = []
    for annotation in truth["annotations"]:
        for _ in range(30):
            x, y, w, h = annotation["bbox"]
            bbox = [x + rng.normal(0, w / 8), y + rng.normal(0, h / 8), w * rng.uniform(0.8, 1.2), h]
            found.append(detection(annotation["image_id"], int(rng.integers(1, 4)), bbox, round(rng.uniform(), 1)))
    assert len(found) > 500
    assert_both_ways_agree(truth, found, coco_rules(500))


@pytest.mark.parametrize("rules", [coco_rules(), aitod_rules()], ids=lambda r: r[0])
@pytest.mark.parametrize("side_px", [2, 8, 16, 32, 64, 96])
def test_equals_pycocotools_where_areas_lie_on_a_bound(side_px: int, rules: CocoRules) -> None:
    square = [100, 100, side_px, side_px]
    larger = [100, 100, side_px, side_px + 0.01]
    elsewhere = [500, 500, side_px, side_px]
    # The object is on the bound and its detection beyond, or the other way round; a more likely one hits nothing.
    for bound_first in (True, False):
        one, other = (square, larger) if bound_first else (larger, square)
        truth = ground_truth((1, 1, one), (1, 1, [300, 300, side_px, side_px]))
        found = [detection(1, 1, other, 0.5), detection(1, 1, elsewhere, 0.8)]
        assert_both_ways_agree(truth, found, rules)


def test_equals_pycocotools_under_an_ignore_rule() -> None:
    truth, found = random_set(1)
    for image in truth["images"][::2]:
        image["ignore_regions_xywh"] = [[0, 0, 400, 400], [300, 300, 200, 350]]
    assert_both_ways_agree(truth, found, coco_rules(), "covered-half")


def test_equals_pycocotools_without_detections_and_without_objects() -> None:
    truth, found = random_set(2)
    assert_both_ways_agree(truth, [], coco_rules())
    assert_both_ways_agree({**truth, "annotations": []}, found, coco_rules())
    assert_both_ways_agree(ground_truth(), [], coco_rules())
    crowds = [{**annotation, "iscrowd": 1} for annotation in truth["annotations"]]
    assert_both_ways_agree({**truth, "annotations": crowds}, found, coco_rules())


def test_equals_pycocotools_whatever_the_order_of_images_and_classes() -> None:
    truth, found = random_set(4)
    truth["images"].reverse()
    truth["categories"].reverse()
    truth["annotations"].reverse()
    assert_both_ways_agree(truth, found[::-1], coco_rules())


def test_equals_pycocotools_on_the_coco_api_s_fixture() -> None:
    folder = SHARED / "coco_eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the COCO API's evaluation fixture is not part of the project")
    truth = json.loads((folder / "dataset/cocoapi/instances_val2014_100.json").read_text())
    found = json.loads((folder / "cocoapi_results/instances_val2014_fakebbox100_results.json").read_text())
    for rules in (coco_rules(), aitod_rules()):
        assert_both_ways_agree(truth, found, rules)


boxes = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2)
objects = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2), boxes, st.booleans()), max_size=8)
scored = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2), boxes, st.sampled_from([0.2, 0.5, 0.9])), max_size=12)


@given(objects, scored)
def test_matching_is_the_plain_loop(
    objects: list[tuple[int, int, Any, bool]], scored: list[tuple[int, int, Any, float]]
) -> None:
    truth = ground_truth(*((i, c, list(b)) for i, c, b, _ in objects), num_images=2, num_classes=2)
    for annotation, (*_, is_crowd) in zip(truth["annotations"], objects, strict=True):
        annotation["iscrowd"] = int(is_crowd)
    tables = tabulate(truth, [detection(i, c, list(b), s) for i, c, b, s in scored])
    truths, detections = tables.truths, tables.detections
    thresholds = np.array([0.3, 0.5, 0.7])
    ignored = np.stack([truths.is_crowd, truths.is_crowd | (truths.areas_px > 12)])
    for across_classes in (False, True):
        pairs = overlapping(truths, detections, 0.3, across_classes=across_classes)
        taken = match_greedily(pairs, len(scored), truths.is_crowd, ignored, thresholds)
        for view, rows in enumerate(ignored):
            for t, threshold in enumerate(thresholds):
                expected = plain_loop(tables, rows, threshold, across_classes)
                assert taken[view, t].tolist() == expected


def plain_loop(tables: Any, ignored: Any, threshold: float, across_classes: bool) -> list[int]:
    truths, detections = tables.truths, tables.detections
    taken = [NOT_MATCHED] * len(detections.image)
    for row in np.argsort(-detections.scores, kind="stable").tolist():
        best, best_key = NOT_MATCHED, (False, threshold)
        for candidate in range(len(truths.image)):
            if truths.image[candidate] != detections.image[row]:
                continue
            if truths.label[candidate] != detections.label[row] and not across_classes:
                continue
            if candidate in taken and not truths.is_crowd[candidate]:
                continue
            overlap = iou(detections.boxes_xywh_px[row], truths.boxes_xywh_px[candidate], truths.is_crowd[candidate])
            key = (not bool(ignored[candidate]), overlap)
            if overlap >= threshold and (best == NOT_MATCHED or key >= best_key):
                best, best_key = candidate, key
        taken[row] = best
    return taken


def iou(one: Any, other: Any, is_crowd: bool) -> float:
    wide, high = (max(0.0, min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    area, other_area = one[2] * one[3], other[2] * other[3]
    return float(wide * high / (area if is_crowd else area + other_area - wide * high))


def test_ranks_keep_the_order_of_equal_scores() -> None:
    tables = tabulate(
        ground_truth(num_images=2),
        [detection(1, 1, [0, 0, 1, 1], s) for s in (0.5, 0.9, 0.5)] + [detection(2, 1, [0, 0, 1, 1], 0.7)],
    )
    assert ranks(tables.detections, tables.detections.image).tolist() == [1, 0, 2, 0]
    nothing = tabulate(ground_truth(), []).detections
    assert ranks(nothing, nothing.image).tolist() == []

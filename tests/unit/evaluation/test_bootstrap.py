"""Scores of resampled images against pycocotools on sets in which images are really repeated, and a plain loop."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import crowded_set, detection, ground_truth, random_set

import evaluation.bootstrap
from evaluation.bootstrap import Floats, draw, resample
from evaluation.coco import CocoRules, aitod_rules, coco_rules, score_tables
from evaluation.outcomes import Outcomes, curves_of, outcomes_of
from evaluation.samples import Samples, coco_samples, visdrone_samples, voc_samples
from evaluation.tables import Tables, tabulate

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
EVERYTHING = {"all": (0.0, 1e10)}


def repeated(tables: Tables, times: Floats) -> Tables:
    """The set with image i there `times[i]` times, copies side by side; scores become places in the whole set's order.

    Detections of equal score then follow each other as they do in the whole set, each with its copies.
    """
    times = times.astype(np.int64)
    starts = np.cumsum(times) - times
    detections = tables.detections
    order = np.lexsort((detections.image, -detections.scores))
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    detections = detections._replace(scores=1 - place / (1 + len(order)))

    def copies(table: Any) -> Any:
        rows = [
            (row, starts[image] + copy)
            for row, image in enumerate(table.image.tolist())
            for copy in range(times[image])
        ]
        index, image = np.array(rows, np.int64).reshape(-1, 2).T
        return table.take(index)._replace(image=image)

    ids = np.arange(times.sum())
    names, sizes, regions = (np.repeat(np.arange(len(times)), times) for _ in range(3))
    return tables._replace(
        truths=copies(tables.truths),
        detections=copies(detections),
        image_ids=ids,
        file_names=tuple(tables.file_names[i] for i in names),
        image_sizes_px=tables.image_sizes_px[sizes],
        ignore_regions_xywh_px=tuple(tables.ignore_regions_xywh_px[i] for i in regions),
    )


def assert_equals_pycocotools(tables: Tables, rules: CocoRules, weights: Floats, ignore_rule: Any = "none") -> None:
    samples = coco_samples(tables, weights, rules=rules, ignore_rule=ignore_rule)
    for sample in range(weights.shape[1]):
        expected = score_tables(repeated(tables, weights[:, sample]), rules, ignore_rule=ignore_rule)
        _assert_equal(samples, sample, expected)


def _assert_equal(samples: Samples, sample: int, expected: Any) -> None:
    for name, values in samples.metrics.items():
        assert values[sample] == _as_nan(expected.metrics[name]), name
    for label, row in samples.per_class.items():
        for name, values in row.items():
            assert values[sample] == _as_nan(expected.per_class[label][name]), (label, name)


def _as_nan(value: float | None) -> Any:
    return pytest.approx(np.nan if value is None else value, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("rules", [coco_rules(5), coco_rules(100), aitod_rules()], ids=lambda r: f"{r[0]}-{r[2][-1]}")
@pytest.mark.parametrize("seed", range(4))
def test_a_sample_scores_as_pycocotools_scores_repeated_images(seed: int, rules: CocoRules) -> None:
    assert_equals_pycocotools(tabulate(*random_set(seed)), rules, draw(np.arange(8), 6, seed))


def test_the_same_with_ignore_regions_and_without_detections() -> None:
    truth, found = random_set(1)
    for image in truth["images"][::2]:
        image["ignore_regions_xywh"] = [[0, 0, 400, 400], [300, 300, 200, 350]]
    weights = draw(np.arange(8), 4, 0)
    assert_equals_pycocotools(tabulate(truth, found), coco_rules(), weights, "covered-half")
    assert_equals_pycocotools(tabulate(truth, []), coco_rules(), weights)
    assert_equals_pycocotools(tabulate({**truth, "annotations": []}, found), coco_rules(), weights)


def test_points_of_recall_are_reached_as_floats_say() -> None:
    # 100 objects, all found: 35 of 100 are .35, but the 35th point is 35 * .01, a trifle more.
    boxes = [[20.0 * (i % 10), 20.0 * (i // 10), 9.0, 9.0] for i in range(25)]
    truth = ground_truth(*((1 + image, 1, box) for image in range(4) for box in boxes), num_images=4)
    found = [
        detection(1 + i % 4, 1, [900.0, 900.0, 9.0, 9.0] if i % 3 == 0 else boxes[i // 4], 1 - i / 200)
        for i in range(100)
    ]
    weights = np.array([[1, 1, 1, 1], [2, 1, 1, 0], [4, 0, 0, 0], [0, 1, 1, 3]], np.float64).T
    assert_equals_pycocotools(tabulate(truth, found), coco_rules(), weights)


def test_the_coco_apis_fixture_scores_as_pycocotools_says() -> None:
    folder = SHARED / "coco_eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the COCO API's evaluation fixture is not part of the project")
    truth = json.loads((folder / "dataset/cocoapi/instances_val2014_100.json").read_text())
    found = json.loads((folder / "cocoapi_results/instances_val2014_fakebbox100_results.json").read_text())
    tables = tabulate(truth, found)
    assert_equals_pycocotools(tables, coco_rules(), draw(np.arange(len(tables.image_ids)), 2, 0))


def test_crowded_images_score_as_pycocotools_says() -> None:
    tables = tabulate(*crowded_set(20, 800, 5000, num_classes=4))
    assert_equals_pycocotools(tables, coco_rules(500), draw(np.arange(20) // 2, 2, 0))


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 3), st.sampled_from([0.2, 0.5, 0.9])),
        max_size=25,
    ),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 3), st.booleans()), max_size=10),
    st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any),
)
@settings(max_examples=60)
def test_any_small_set_scores_as_pycocotools_says(found: Any, objects: Any, weights: list[int]) -> None:
    boxes = [[0.0, 0.0, 40.0, 30.0], [10.0, 0.0, 40.0, 30.0], [4.0, 3.0, 30.0, 30.0], [60.0, 60.0, 20.0, 20.0]]
    truth = ground_truth(*((image, label, boxes[box]) for image, label, box, _ in objects), num_images=4, num_classes=2)
    for annotation, (*_, is_crowd) in zip(truth["annotations"], objects, strict=True):
        annotation["iscrowd"] = int(is_crowd)
    detections = [detection(image, label, boxes[box], value) for image, label, box, value in found]
    tables = tabulate(truth, detections)
    assert_equals_pycocotools(tables, coco_rules(3), np.array([weights], np.float64).T)


@pytest.mark.parametrize("seed", range(3))
def test_the_set_itself_has_the_curves_of_the_set(seed: int) -> None:
    rules = coco_rules(100)
    tables = tabulate(*random_set(seed))
    outcomes = outcomes_of(tables.truths, tables.detections, rules.areas, 100)
    scores = resample(outcomes, np.ones((8, 1)), 4, all_points=False)
    curves = curves_of(outcomes, 4, [100])
    for values, expected in (
        (scores.average_precision[0], curves.precision.mean(axis=1).transpose(2, 0, 1)),
        (scores.recall[0], curves.recall[..., 0].transpose(2, 0, 1)),
    ):
        np.testing.assert_allclose(np.where(np.isnan(values), -1, values), expected, rtol=0, atol=1e-12)


def area_under_curve(outcomes: Outcomes, label: int, threshold: int, times: Floats) -> tuple[float, float]:
    """AP over all points and recall, one detection and one copy at a time."""
    of_class = outcomes.is_scored[0] & (outcomes.truths.label == label)
    num_truths = times[outcomes.truths.image[of_class]].sum()
    hits = counted = 0
    curve = []
    for row in np.flatnonzero(outcomes.detections.label == label):
        for _ in range(int(times[outcomes.detections.image[row]])):
            hits += int(outcomes.is_hit[0, threshold, row])
            counted += int(outcomes.is_counted[0, threshold, row])
            curve.append((hits / num_truths, hits / max(counted, 1)))
    area = before = 0.0
    for place, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[place:])
        before = recall
    return area, before


@pytest.mark.parametrize("seed", range(3))
def test_area_under_the_curve_equals_a_loop_and_class_weights_are_the_samples_own(seed: int) -> None:
    tables = tabulate(*random_set(seed))
    outcomes = outcomes_of(tables.truths, tables.detections, EVERYTHING, 100)
    weights = draw(np.arange(8), 5, seed)
    at_50 = outcomes._replace(is_hit=outcomes.is_hit[:, :1], is_counted=outcomes.is_counted[:, :1])
    voc = voc_samples(at_50, weights, tables.class_names)
    visdrone = visdrone_samples(outcomes, weights, tables.class_names, max_dets=100)
    scored = outcomes.truths.take(outcomes.is_scored[0])
    for sample, times in enumerate(weights.T):
        images = {label: sorted({*scored.image[scored.label == label].tolist()}) for label in range(4)}
        frequency = {label: times[found].sum() for label, found in images.items() if times[found].sum()}
        loop = {label: [area_under_curve(outcomes, label, t, times) for t in range(10)] for label in frequency}
        ap = {label: [area for area, _ in row] for label, row in loop.items()}
        recall = {label: np.mean([last for _, last in row]) for label, row in loop.items()}
        total = sum(frequency.values())
        for values, expected in (
            (voc.metrics["voc/mAP50"], np.mean([row[0] for row in ap.values()])),
            (visdrone.metrics["visdrone/AP"], sum(frequency[c] * np.mean(ap[c]) for c in ap) / total),
            (visdrone.metrics["visdrone/AP50"], sum(frequency[c] * ap[c][0] for c in ap) / total),
            (visdrone.metrics["visdrone/AP75"], sum(frequency[c] * ap[c][5] for c in ap) / total),
            (visdrone.metrics["visdrone/AR_100"], sum(frequency[c] * recall[c] for c in ap) / total),
        ):
            assert values[sample] == pytest.approx(expected, abs=1e-12)
        for label, name in enumerate(tables.class_names):
            expected_class = ap[label][0] if label in ap else np.nan
            assert voc.per_class[name]["voc/AP50"][sample] == pytest.approx(expected_class, abs=1e-12, nan_ok=True)


def test_blocks_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tabulate(*random_set(2))
    sample = partial(coco_samples, tables, draw(np.arange(8), 9, 1), rules=coco_rules(), ignore_rule="none")
    at_once = sample()
    monkeypatch.setattr(evaluation.bootstrap, "_BLOCK", 4)
    for name, values in sample().metrics.items():
        np.testing.assert_array_equal(values, at_once.metrics[name])


@given(st.lists(st.integers(-3, 6), min_size=1, max_size=20), st.integers(0, 99))
def test_groups_are_drawn_whole_and_as_many_as_there_are(groups: list[int], seed: int) -> None:
    weights = draw(np.array(groups), 7, seed)
    assert weights.shape == (len(groups), 8)
    assert (weights[:, 0] == 1).all()
    first_of_group = {group: image for image, group in reversed([*enumerate(groups)])}
    assert (weights == weights[[first_of_group[group] for group in groups]]).all()
    assert (weights[sorted(first_of_group.values())].sum(axis=0) == len(first_of_group)).all()


def test_samples_depend_on_the_seed_alone() -> None:
    few, many, other = (draw(np.arange(30), *asked) for asked in ((3, 1), (50, 1), (3, 2)))
    np.testing.assert_array_equal(few, many[:, :4])
    assert not np.array_equal(few, other)
    # Each image is expected once.
    assert many.mean() == 1

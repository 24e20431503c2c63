"""Two sets of detections compared: what must hold whatever they are, and how often the interval is right."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import detection, ground_truth, random_set

from evaluation.coco import coco_rules, score_tables
from evaluation.samples import coco_samples
from evaluation.significance import Comparison, Difference, NotComparable, compare, intervals
from evaluation.tables import Tables, tabulate

SAMPLE = partial(coco_samples, rules=coco_rules(), ignore_rule="none")


def shaken(found: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same detections with other scores."""
    rng = np.random.default_rng(seed)
    return [{**one, "score": float(np.clip(one["score"] + rng.normal(0, 0.2), 0, 1))} for one in found]


def pair(seed: int) -> tuple[Tables, Tables]:
    truth, found = random_set(seed)
    return tabulate(truth, found), tabulate(truth, shaken(found, seed))


def flat(comparison: Comparison) -> dict[str, Difference]:
    return comparison.metrics | {
        f"{label}/{name}": value for label, row in comparison.per_class.items() for name, value in row.items()
    }


def test_both_values_are_the_scores_of_the_whole_set() -> None:
    first, second = pair(0)
    comparison = compare(first, second, SAMPLE, num_samples=20)
    for tables, values in (
        (first, {name: found.first for name, found in flat(comparison).items()}),
        (second, {name: found.second for name, found in flat(comparison).items()}),
    ):
        scored = score_tables(tables, coco_rules(), ignore_rule="none")
        expected = scored.metrics | {
            f"{label}/{name}": value for label, row in scored.per_class.items() for name, value in row.items()
        }
        assert values == {name: pytest.approx(expected[name], abs=1e-12) for name in values}
    assert list(comparison.metrics) == [
        f"coco/{name}" for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100")
    ]
    assert (comparison.num_images, comparison.num_groups, comparison.num_samples) == (8, 8, 20)
    json.dumps(asdict(comparison), allow_nan=False)


def test_the_interval_of_one_run_is_that_of_its_lead_over_a_run_that_finds_nothing() -> None:
    truth, found = random_set(0)
    tables, nothing = tabulate(truth, found), tabulate(truth, [])
    lead = compare(nothing, tables, SAMPLE, num_samples=50, seed=3).metrics
    bounds = intervals(tables, SAMPLE, num_samples=50, seed=3)
    assert bounds.keys() == {name for name, one in lead.items() if one.difference is not None}
    assert bounds == {name: (lead[name].low, lead[name].high) for name in bounds}
    assert bounds["coco/AP"][0] < lead["coco/AP"].second < bounds["coco/AP"][1]
    with pytest.raises(NotComparable, match=r"1 group"):
        intervals(tables, SAMPLE, groups=np.zeros(len(tables.image_ids), np.int64))


@given(st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=8)
def test_a_run_against_itself_differs_by_exactly_nothing(data_seed: int, seed: int) -> None:
    tables, _ = pair(data_seed)
    for found in flat(compare(tables, tables, SAMPLE, num_samples=10, seed=seed)).values():
        if found.num_samples:
            assert (found.difference, found.low, found.high, found.share_better) == (0, 0, 0, 0)
            assert found.verdict == "not distinguishable"


@given(st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=8)
def test_swapped_runs_swap_signs_and_the_same_seed_gives_the_same(data_seed: int, seed: int) -> None:
    first, second = pair(data_seed)
    there, back = (
        compare(first, second, SAMPLE, num_samples=30, seed=seed),
        compare(second, first, SAMPLE, num_samples=30, seed=seed),
    )
    opposite = {"better": "worse", "worse": "better"}
    for name, one in flat(there).items():
        other = flat(back)[name]
        assert (one.first, one.second, one.num_samples) == (other.second, other.first, other.num_samples)
        if one.difference is not None and one.low is not None and one.high is not None:
            assert other.difference == -one.difference
            assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-12)
            assert one.share_better + other.share_better <= 1  # type: ignore[operator]
            assert other.verdict == opposite.get(str(one.verdict), one.verdict)
    assert compare(first, second, SAMPLE, num_samples=30, seed=seed) == there


def test_a_clear_difference_is_told_and_its_interval_has_a_closed_form() -> None:
    # AP of the first run is the share of images with a detection, of the second it is 1 in every sample.
    box = [10.0, 10.0, 20.0, 20.0]
    truth = ground_truth(*((image, 1, box) for image in range(1, 41)), num_images=40)
    half = tabulate(truth, [detection(image, 1, box) for image in range(1, 21)])
    whole = tabulate(truth, [detection(image, 1, box) for image in range(1, 41)])
    found = compare(half, whole, SAMPLE, num_samples=4000).metrics["coco/AR_100"]
    assert (found.first, found.second, found.difference, found.verdict) == (0.5, 1.0, 0.5, "better")
    # The number of the first 20 images among 40 draws is binomial: its quantiles are 14 and 26 of 40.
    assert (found.low, found.high) == pytest.approx((1 - 26 / 40, 1 - 14 / 40), abs=1 / 40)
    assert found.share_better == 1
    by_group = compare(half, whole, SAMPLE, num_samples=200, groups=np.arange(40) // 20).metrics["coco/AR_100"]
    # Two groups: both runs are equal in a sample that holds the first one twice.
    assert (by_group.low, by_group.high, by_group.verdict) == (0.0, 1.0, "not distinguishable")
    assert by_group.share_better == pytest.approx(0.75, abs=0.1)


def test_samples_without_an_object_are_left_out_and_counted() -> None:
    box = [10.0, 10.0, 20.0, 20.0]
    truth = ground_truth((1, 1, box), (2, 2, box), num_images=2, num_classes=3)
    tables = tabulate(truth, [detection(1, 1, box)])
    comparison = compare(tables, tables, SAMPLE, num_samples=400)
    assert comparison.metrics["coco/AP"].num_samples == 400
    assert comparison.metrics["coco/AP_large"] == Difference(None, None, None, None, None, None, 0, None)
    assert comparison.per_class["class-1"]["coco/AP"].num_samples == pytest.approx(300, abs=40)
    assert comparison.per_class["class-3"]["coco/AP"].verdict is None


def test_what_does_not_compare_is_refused() -> None:
    truth, found = random_set(0)
    tables = tabulate(truth, found)
    moved = {**truth, "annotations": [{**truth["annotations"][0], "bbox": [0, 0, 9, 9]}, *truth["annotations"][1:]]}
    renamed = {**truth, "categories": [{**c, "name": c["name"].upper()} for c in truth["categories"]]}
    fewer = {**truth, "images": truth["images"] + [{"id": 99}]}
    for other, what in ((moved, "ground truths"), (renamed, "class names"), (fewer, r"image ids \(8 and 9\)")):
        with pytest.raises(NotComparable, match=f"different {what}"):
            compare(tables, tabulate(other, found), SAMPLE)
    with pytest.raises(NotComparable, match=r"8 images in 1 group\(s\)"):
        compare(tables, tables, SAMPLE, groups=np.zeros(8, np.int64))
    empty = tabulate(ground_truth(num_images=0), [])
    with pytest.raises(NotComparable, match=r"0 images in 0 group\(s\)"):
        compare(empty, empty, SAMPLE)
    with pytest.raises(ValueError, match="groups has 3 numbers for 8 images"):
        compare(tables, tables, SAMPLE, groups=np.arange(3))
    for wrong in ({"num_samples": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="at least 1, and between 0 and 1"):
            compare(tables, tables, SAMPLE, **wrong)  # type: ignore[arg-type]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)

    def drawn(num_images: int) -> tuple[Tables, Tables]:
        """Images with 1 to 8 objects; the runs find .7 and .6 of them, more in some images than in others."""
        box_of = [[30.0 * place, 10.0, 20.0, 20.0] for place in range(16)]
        objects, found = [], ([], [])  # type: ignore[var-annotated]
        for image in range(1, num_images + 1):
            hardness = rng.normal(0, 0.15)
            for place in range(int(rng.integers(1, 9))):
                objects.append((image, 1, box_of[place]))
                for run, chance in enumerate((0.7, 0.6)):
                    if rng.uniform() < chance + hardness:
                        found[run].append(detection(image, 1, box_of[place], rng.beta(4, 2)))
            for run in range(2):
                for place in range(8, 8 + int(rng.integers(0, 3))):
                    found[run].append(detection(image, 1, box_of[place], rng.beta(2, 4)))
        truth = ground_truth(*objects, num_images=num_images)
        return tabulate(truth, found[0]), tabulate(truth, found[1])

    first, second = (
        score_tables(tables, coco_rules(), ignore_rule="none", by_pycocotools=False).metrics["coco/AP"]
        for tables in drawn(20_000)
    )
    assert first is not None
    assert second is not None
    true, trials, held = second - first, 300, 0
    for trial in range(trials):
        interval = compare(*drawn(100), SAMPLE, num_samples=300, seed=trial).metrics["coco/AP"]
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= true <= interval.high
    # Four standard deviations of a share of 300 trials are .05, and intervals of 100 images may be a little short.
    assert held / trials == pytest.approx(0.95, abs=0.08)

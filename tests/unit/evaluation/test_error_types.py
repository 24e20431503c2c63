"""Error types: one picture for each, and random scenes against loops over the definitions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from plain_analysis import PlainAnalysis
from scenes import Scene, random_scene, scenes

from evaluation.analysis_records import ErrorTypes
from evaluation.coco import coco_rules, score, scored_rows
from evaluation.error_types import TYPES, _classified, _mended_ap50, error_types
from evaluation.judged import Judged, judge
from evaluation.outcomes import outcomes_of
from evaluation.tables import tabulate

CAR, BUS = 1, 2
A, B = [10, 10, 10, 10], [60, 10, 10, 10]


def judged_scene(scene: Scene, max_dets: int = 100) -> Judged:
    tables = tabulate(*scene)
    truths, detections, _ = scored_rows(tables, "covered-half")
    rules = coco_rules(max_dets)
    return judge(outcomes_of(truths, detections, rules.areas, max_dets), tables.class_names)


def one_image(objects: list[tuple[int, list[float]]], found: list[tuple[int, list[float], float]]) -> ErrorTypes:
    truth: dict[str, Any] = {
        "images": [{"id": 1, "ignore_regions_xywh": [[200, 0, 50, 50]]}],
        "categories": [{"id": CAR, "name": "car"}, {"id": BUS, "name": "bus"}],
        "annotations": [{"image_id": 1, "category_id": label, "bbox": box} for label, box in objects]
        + [{"image_id": 1, "category_id": CAR, "bbox": [300, 0, 50, 50], "iscrowd": 1}],
    }
    detections = [{"image_id": 1, "category_id": label, "bbox": box, "score": s} for label, box, s in found]
    return error_types(judged_scene((truth, detections)), 0.0)


def expect(found: ErrorTypes, ap50: float, counts: dict[str, int], lost_ap50: dict[str, float]) -> None:
    assert found.ap50 == pytest.approx(ap50)
    assert found.counts == {**dict.fromkeys(TYPES, 0), **counts}
    everything = {**dict.fromkeys([*TYPES, "false positives", "false negatives"], 0.0), **lost_ap50}
    assert found.lost_ap50 == pytest.approx(everything)


def test_class() -> None:
    """After the car a bus taken for one: AP is 1 and 0. The error stands for the bus: it is not missed."""
    found = one_image([(CAR, A), (BUS, B)], [(CAR, A, 0.9), (CAR, B, 0.8)])
    expect(found, 1 / 2, {"class": 1}, {"class": 1 / 2, "false negatives": 1 / 2})


def test_localisation() -> None:
    found = one_image([(CAR, A)], [(CAR, [10, 10, 10, 4], 0.9)])
    expect(found, 0, {"localisation": 1}, {"localisation": 1, "false negatives": 0})


def test_both() -> None:
    """.4 of a bus taken for a car, before the car: precision 1/2. The bus is missed."""
    found = one_image([(CAR, A), (BUS, B)], [(CAR, [60, 10, 10, 4], 0.9), (CAR, A, 0.8)])
    lost = {"both": 1 / 4, "missed": 1 / 2, "false positives": 1 / 4, "false negatives": 1 / 2}
    expect(found, 1 / 4, {"both": 1, "missed": 1}, lost)


def test_duplicate() -> None:
    """Precision 1 up to recall 1/2, 51 of the points, then 2/3."""
    found = one_image([(CAR, A), (CAR, B)], [(CAR, A, 0.9), (CAR, A, 0.8), (CAR, B, 0.7)])
    lost = 50 / 3 / 101
    expect(found, 1 - lost, {"duplicate": 1}, {"duplicate": lost, "false positives": lost})


def test_background() -> None:
    found = one_image([(CAR, A)], [(CAR, [100, 100, 9, 9], 0.9), (BUS, [10, 50, 9, 9], 0.9), (CAR, A, 0.8)])
    expect(found, 1 / 2, {"background": 2}, {"background": 1 / 2, "false positives": 1 / 2})


def test_missed() -> None:
    found = one_image([(CAR, A), (CAR, B)], [(CAR, A, 0.9)])
    expect(found, 51 / 101, {"missed": 1}, {"missed": 50 / 101, "false negatives": 50 / 101})


def test_a_class_that_was_never_reported_lost_all_by_missing() -> None:
    expect(one_image([(CAR, A)], []), 0, {"missed": 1}, {"missed": 1, "false negatives": 1})


def test_a_class_reported_only_where_it_is_not_gains_nothing_by_what_it_missed() -> None:
    expect(one_image([(CAR, A)], [(CAR, B, 0.9)]), 0, {"missed": 1, "background": 1}, {})


def test_ignored_detections_are_no_errors() -> None:
    found = one_image([(CAR, A)], [(CAR, [210, 10, 9, 9], 0.95), (CAR, [310, 10, 9, 9], 0.95), (CAR, A, 0.9)])
    expect(found, 1, {}, {})
    # Neither is a crowd of cars there for a bus.
    found = one_image([(BUS, A)], [(BUS, [310, 10, 40, 40], 0.95), (BUS, A, 0.9)])
    expect(found, 1 / 2, {"background": 1}, {"background": 1 / 2, "false positives": 1 / 2})


def test_without_objects_there_is_no_ap_to_lose() -> None:
    found = one_image([], [(CAR, A, 0.9)])
    assert found == ErrorTypes(None, {**dict.fromkeys(TYPES, 0), "background": 1}, {})


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([10, 10, 5, 10], None),
        ([10, 10, 4.9, 10], "localisation"),
        ([10, 10, 1, 10], "localisation"),
        ([10, 10, 0.9, 10], "background"),
    ],
)
def test_a_bound_belongs_to_the_better_overlap(box: list[float], kind: str | None) -> None:
    """IoU with the car is a tenth of the width; with a bus of the same box it is never reached before the own class."""
    counts = one_image([(CAR, A)], [(CAR, box, 0.9)]).counts
    assert [name for name in TYPES[:-1] if counts[name]] == ([kind] if kind else [])
    counts = one_image([(BUS, A)], [(CAR, box, 0.9)]).counts
    other = {None: "class", "localisation": "both", "background": "background"}[kind]
    assert [name for name in TYPES[:-1] if counts[name]] == [other]


def test_order_of_the_types() -> None:
    """.2 of a car and all of a bus: localisation. All of a taken car and all of a bus: class."""
    near_car = one_image([(CAR, [10, 12, 10, 2]), (BUS, A)], [(CAR, A, 0.9)])
    assert near_car.counts == {**dict.fromkeys(TYPES, 0), "localisation": 1, "missed": 1}
    taken_car = one_image([(CAR, A), (BUS, A)], [(CAR, A, 0.9), (CAR, A, 0.8)])
    assert taken_car.counts == {**dict.fromkeys(TYPES, 0), "class": 1}


def test_one_error_stands_for_an_object_and_none_takes_it_from_a_hit() -> None:
    # Of two poor boxes the better scored becomes a hit, the other goes.
    found = one_image([(CAR, A)], [(CAR, [10, 10, 10, 3], 0.8), (CAR, [10, 10, 10, 4], 0.9)])
    expect(found, 0, {"localisation": 2}, {"localisation": 1})
    # The mended box goes although it scores higher than the hit, as if it had not been there.
    found = one_image([(CAR, A)], [(CAR, [10, 10, 10, 4], 0.9), (CAR, A, 0.5)])
    expect(found, 1 / 2, {"localisation": 1}, {"localisation": 1 / 2, "false positives": 1 / 2})


def test_counts_are_those_at_the_threshold_and_ap_looks_at_all() -> None:
    scene = random_scene(5)
    everything, above = (error_types(judged_scene(scene), threshold) for threshold in (0.0, 0.6))
    assert above.lost_ap50 == everything.lost_ap50
    assert all(0 < above.counts[name] < everything.counts[name] for name in TYPES[:-1])
    assert above.counts["missed"] > everything.counts["missed"] > 0


def _compare(scene: Scene, threshold: float, max_dets: int) -> None:
    plain, judged = PlainAnalysis(*scene, max_dets), judged_scene(scene, max_dets)
    found = error_types(judged, threshold)
    assert found.ap50 == pytest.approx(plain.mended_ap50(()), abs=1e-12)
    official = score(*scene, max_dets=max_dets, ignore_rule="covered-half").metrics["coco/AP50"]
    assert found.ap50 == pytest.approx(official, abs=1e-12)
    assert found.counts == {
        **{kind: sum(d.outcome == kind and d.score >= threshold for d in plain.detections) for kind in TYPES[:-1]},
        "missed": len(plain.missed(threshold)),
    }
    if found.ap50 is None:
        assert found.lost_ap50 == {}
        return
    names = [*TYPES, "false positives", "false negatives"]
    assert found.lost_ap50 == pytest.approx({name: plain.mended_ap50({name}) - found.ap50 for name in names}, abs=1e-12)
    assert min(found.lost_ap50.values()) >= -1e-12
    # Nothing is left to mend when all is mended.
    assert _mended_ap50(judged, _classified(judged), TYPES) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_equals_loops_over_the_definitions(seed: int) -> None:
    scene = random_scene(seed)
    _compare(scene, 0.5, 100)
    _compare(scene, 0.0, 4)


@settings(deadline=None)
@given(scenes())
def test_equals_them_on_any_small_scene(scene: Scene) -> None:
    _compare(scene, 0.5, 2)

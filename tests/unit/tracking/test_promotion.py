from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tracking.promotion import Gain, Gates, Side, Verdict, decide

PROTOCOL = "coco max_dets=100 ignore_rule=none"
GATES = Gates(
    protocol=PROTOCOL, max_dets=100, metric="coco/AP", rule="superior", margin=None, confidence=0.95, floors={},
    max_drop={}, class_floors={}, max_class_drop=None, min_test_images=None, max_size_mib=None, max_latency_ms=None,
    max_latency_ratio=None, other_classes=False, approval=False,
)  # fmt: skip
CHAMPION = Side(
    training="0123456789ab", dataset_version="a" * 32, protocol=PROTOCOL, classes=("car", "person"),
    metrics={"coco/AP": 0.30, "coco/AP_small": 0.20, "coco/AP_large": None}, per_class={"car": 0.4, "person": 0.2},
    num_images=100, num_split=100, size_bytes=2**20, latency_ms=10.0,
)  # fmt: skip
CANDIDATE = replace(CHAMPION, training="ba9876543210", metrics={**CHAMPION.metrics, "coco/AP": 0.31})
GAIN = Gain(0.01, 0.002, 0.018, 0.95, "100 images")


def gates(**changes: Any) -> Gates:
    return Gates.model_validate(GATES.model_dump() | changes)


def failed(verdict: Verdict) -> list[str]:
    assert verdict.promote == all(row.passed for row in verdict.rows)
    return [row.gate for row in verdict.rows if not row.passed]


def scored(ap: float | None, **more: float | None) -> Side:
    return replace(CANDIDATE, metrics={**CANDIDATE.metrics, "coco/AP": ap, **more})


def test_the_first_sound_model_is_promoted_without_a_comparison() -> None:
    verdict = decide(CANDIDATE, None, gates(max_drop={"coco/AP_small": 0.0}, max_class_drop=0.0))
    assert verdict.promote
    assert verdict.reason == "no champion to compare with: coco/AP 0.3100"
    assert [row.gate for row in verdict.rows] == [
        "lineage", "finite", "protocol", "test pictures", "test pictures trained on",
    ]  # fmt: skip


def test_a_first_model_that_found_nothing_is_promoted_with_a_word() -> None:
    assert "found nothing: train longer" in decide(scored(0.0), None, GATES).reason
    assert failed(decide(scored(0.0), None, gates(floors={"coco/AP": 0.01}))) == ["coco/AP"]


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.001, 0.5))
def test_the_lower_end_of_the_interval_decides(low: float, width: float, margin: float) -> None:
    gain = Gain(low + width / 2, low, low + width, 0.95, "100 images")
    assert decide(CANDIDATE, CHAMPION, GATES, gain).promote == (low > 0)
    assert decide(CANDIDATE, CHAMPION, gates(rule="non_inferior", margin=margin), gain).promote == (low > -margin)


def test_the_verdict_says_when_the_pictures_cannot_tell_the_two_apart() -> None:
    verdict = decide(CANDIDATE, CHAMPION, GATES, replace(GAIN, low=-0.003))
    assert failed(verdict) == ["superior in coco/AP"]
    assert verdict.sound
    assert verdict.reason == (
        "superior in coco/AP: 0.3100 (+0.0100, 95% within -0.0030 to +0.0180 on 100 images, which cannot tell them "
        "apart), asked: the interval of 95% above 0; champion 0123456789ab has 0.3000"
    )
    worse = decide(CANDIDATE, CHAMPION, GATES, Gain(-0.02, -0.03, -0.01, 0.95, "100 images"))
    assert "cannot tell" not in worse.reason
    assert failed(decide(CANDIDATE, CHAMPION, GATES, None)) == ["superior in coco/AP"]


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_score_that_is_not_finite_is_refused(score: float | None, champion: Side | None) -> None:
    verdict = decide(scored(score), champion, GATES, GAIN)
    assert failed(verdict) == ["finite"]
    assert f"coco/AP is {score}" in verdict.reason
    assert not verdict.sound


@pytest.mark.parametrize(
    ("changes", "gate", "told"),
    [
        ({"faults": ("the commit is not known",)}, "lineage", "the commit is not known"),
        ({"non_finite": ("weights stem.weight",)}, "finite", "weights stem.weight"),
        ({"protocol": "coco max_dets=500 ignore_rule=none"}, "protocol", "max_dets=500"),
        ({"num_images": 99}, "test pictures", "99, asked: at least 100"),
        ({"num_images": 90, "num_split": 90}, "test pictures", "90, asked: at least 100"),
        ({"seen": ("a.png", "b.png", "c.png", "d.png")}, "test pictures trained on", "4: a.png, b.png, c.png, ..."),
    ],
)
def test_an_unsound_candidate_is_refused_with_its_reason(changes: Any, gate: str, told: str) -> None:
    verdict = decide(replace(CANDIDATE, **changes), CHAMPION, GATES, GAIN)
    assert failed(verdict) == [gate]
    assert told in verdict.reason
    assert not verdict.sound


def test_a_smaller_test_split_is_allowed_where_the_gates_say_so() -> None:
    cleaned = replace(CANDIDATE, num_images=90, num_split=90)
    assert decide(cleaned, CHAMPION, gates(min_test_images=90), GAIN).promote
    assert failed(decide(cleaned, None, gates(min_test_images=91))) == ["test pictures"]


@pytest.mark.parametrize(("num_seen", "is_promoted"), [(50, True), (51, False)])
def test_half_of_the_test_pictures_must_be_left_without_those_of_the_champion(num_seen: int, is_promoted: bool) -> None:
    trained_on = replace(CHAMPION, seen=tuple(f"{number}.png" for number in range(num_seen)))
    assert decide(CANDIDATE, trained_on, GATES, GAIN).promote is is_promoted


def test_floors_and_drops() -> None:
    asked = gates(
        floors={"coco/AP_small": 0.2},
        class_floors={"person": 0.2},
        max_drop={"coco/AP_small": 0.05},
        max_class_drop=0.1,
    )
    assert decide(CANDIDATE, CHAMPION, asked, GAIN).promote
    weak = replace(scored(0.31, **{"coco/AP_small": 0.14}), per_class={"car": 0.55, "person": 0.05})
    assert failed(decide(weak, CHAMPION, asked, GAIN)) == [
        "coco/AP_small", "coco/AP of person", "drop of coco/AP_small", "drop of coco/AP of a class",
    ]  # fmt: skip
    assert failed(decide(weak, None, asked)) == ["coco/AP_small", "coco/AP of person"]
    unseen = gates(floors={"coco/AP_large": 0.1}, max_drop={"coco/AP_large": 0.0})
    assert failed(decide(CANDIDATE, CHAMPION, unseen, GAIN)) == ["coco/AP_large"], "a floor on nothing is not reached"


def test_budgets() -> None:
    asked = gates(max_size_mib=1.0, max_latency_ms=20.0, max_latency_ratio=1.5)
    assert decide(CANDIDATE, CHAMPION, asked, GAIN).promote
    slow = replace(CANDIDATE, size_bytes=2**20 + 1, latency_ms=15.1)
    assert failed(decide(slow, CHAMPION, asked, GAIN)) == ["size of weights", "latency, p95"]
    assert failed(decide(replace(slow, latency_ms=20.1), None, asked)) == ["size of weights", "latency, p95"]


def test_models_of_other_classes_are_not_compared_and_replace_each_other_only_where_the_gates_say_so() -> None:
    other = replace(CANDIDATE, classes=("car",))
    verdict = decide(other, CHAMPION, GATES, None)
    assert failed(verdict) == ["same classes"]
    assert "`other_classes: true`" in verdict.reason
    assert decide(other, CHAMPION, gates(other_classes=True), None).promote
    assert not decide(replace(other, faults=("no commit",)), CHAMPION, gates(other_classes=True), None).promote


@pytest.mark.parametrize(("rule", "margin"), [("superior", 0.01), ("non_inferior", None), ("non_inferior", 0.0)])
def test_a_margin_belongs_to_non_inferior(rule: str, margin: float | None) -> None:
    with pytest.raises(ValidationError, match="margin"):
        gates(rule=rule, margin=margin)

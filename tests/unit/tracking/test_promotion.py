from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.promotion import Candidate, decide

CHAMPION = Candidate("0123456789ab", "aaaa.dir", "coco/v1", "coco/AP", 0.30)
CHALLENGER = replace(CHAMPION, training="ba9876543210", score=0.31)


def test_the_first_scored_model_is_promoted() -> None:
    assert decide(CHALLENGER, None).promote
    assert decide(CHALLENGER, None).reason.endswith("is the first model with a coco/AP on this dataset")


def test_a_first_model_that_found_nothing_is_promoted_with_a_word() -> None:
    verdict = decide(replace(CHALLENGER, score=0.0), None)
    assert verdict.promote
    assert "found nothing: train longer" in verdict.reason


@given(st.floats(0, 1), st.floats(0, 1))
def test_promotes_exactly_when_the_score_is_strictly_higher(old: float, new: float) -> None:
    verdict = decide(replace(CHALLENGER, score=new), replace(CHAMPION, score=old))
    assert verdict.promote == (new > old)
    assert verdict.promote == all(row.passed for row in verdict.rows)


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_candidate_without_a_finite_score_is_never_promoted(score: float | None, champion: Candidate | None) -> None:
    verdict = decide(replace(CHALLENGER, score=score), champion)
    assert not verdict.promote
    assert CHALLENGER.training in verdict.reason


@pytest.mark.parametrize("score", [None, math.nan, -math.inf])
def test_a_champion_without_a_finite_score_is_not_beaten_but_must_be_scored(score: float | None) -> None:
    verdict = decide(CHALLENGER, replace(CHAMPION, score=score))
    assert not verdict.promote
    assert "champion scored" in verdict.reason


@pytest.mark.parametrize(
    ("field", "value"), [("dataset_version", "bbbb.dir"), ("protocol", "coco/v2"), ("metric", "coco/AP_small")]
)
def test_scores_that_mean_different_things_are_not_compared(field: str, value: str) -> None:
    verdict = decide(replace(CHALLENGER, score=0.99, **{field: value}), CHAMPION)
    assert not verdict.promote
    assert [row.gate for row in verdict.rows if not row.passed] == [f"same {field.replace('_', ' ')}"]
    assert CHAMPION.training in verdict.reason


def test_the_champion_does_not_replace_itself() -> None:
    assert not decide(replace(CHAMPION, score=0.9), CHAMPION).promote

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from tracking.names import metric_name


@pytest.mark.parametrize("name", ["coco/AP_small", "final/test/coco/AP/traffic light", "a:b.c-d", "voiture-électrique"])
def test_names_that_mlflow_accepts_stay(name: str) -> None:
    assert metric_name(name) == name


@given(st.text(max_size=300) | st.text("a./&( ", max_size=8))
def test_mlflow_accepts_every_name(text: str) -> None:
    _validate_metric_name(metric_name(text))
    assert metric_name(metric_name(text)) == metric_name(text)


def test_no_two_names_become_one() -> None:
    names = ["a&b", "a|b", "a_b", "a//b", "a/_/b", "a/../b", "x" * 300, "x" * 301]
    assert len({metric_name(name) for name in names}) == len(names)
    assert metric_name("AP/person (sitting)").startswith("AP/person _sitting__")

"""Charts are checked by the places of what is drawn in them, against the numbers they stand for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import Page

from evaluation.analysis_records import (
    Confusion,
    ErrorTypes,
    Inspection,
    InspectionPoint,
    Reliability,
    ReliabilityBin,
    SizeRecall,
)
from evaluation.charts import (
    MAX_CONFUSED_CLASSES,
    MAX_NAMED_CURVES,
    ap_bars,
    confusion_table,
    error_table,
    inspection_chart,
    pr_curves,
    reliability_chart,
    shaded,
    size_bars,
)
from evaluation.result import _NO_PART

HOSTILE = '<script>alert("x")</script>&amp;'


def points(attributes: dict[str, str | None]) -> np.ndarray:
    return np.array([pair.split(",") for pair in (attributes["points"] or "").split()], float).reshape(-1, 2)


def test_a_pr_curve_is_the_precision_at_each_recall() -> None:
    half = np.where(np.linspace(0, 1, 101) <= 0.5, 1.0, 0.0)
    page = Page(pr_curves({"car": half, HOSTILE: np.linspace(1, 0, 101)}))
    lines = [points(line) for line in page.of("polyline")]
    assert len(lines) == 3
    # From the corners of the falling line the frame is known: precision 1 at recall 0, 0 at 1.
    (left, top), (right, bottom) = lines[1][0], lines[1][-1]
    scale = np.array([right - left, top - bottom])
    np.testing.assert_allclose((lines[0] - [left, bottom]) / scale, np.c_[np.linspace(0, 1, 101), half], atol=1e-3)
    np.testing.assert_allclose(lines[2], (lines[0] + lines[1]) / 2, atol=0.11)
    assert f"{half.mean():.3f} car" in page.text
    assert HOSTILE in page.text
    assert not page.of("script")
    assert not page.problems


def test_of_many_classes_the_worst_are_named_and_the_others_counted() -> None:
    curves = {f"class {number}": np.full(101, 0.01 * number) for number in range(80)}
    page = Page(pr_curves(curves))
    assert len(page.of("polyline")) == 81
    assert all(f"class {number}" in page.text for number in range(7))
    assert "the other 73; named are those of lowest AP50" in page.text
    few = Page(pr_curves(dict(list(curves.items())[:MAX_NAMED_CURVES])))
    assert "other" not in few.text
    assert len({(line["stroke"], line.get("stroke-dasharray")) for line in few.of("polyline")}) == MAX_NAMED_CURVES + 1


def test_without_ground_truth_a_curve_is_not_drawn_but_said() -> None:
    assert "no ground truth" in Page(pr_curves({})).text


def test_bars_are_as_high_as_the_share_they_stand_for() -> None:
    sizes = [SizeRecall("8-16 px", 200, 150, 50, {}), SizeRecall("64 px and more", 0, 0, 0, {})]
    page = Page(size_bars(sizes))
    heights = [float(bar["height"] or 0) for bar in page.of("rect")]
    grid = sorted({float(line["y1"] or 0) for line in page.of("line", **{"class": "grid"})})
    assert np.array(heights) / (grid[-1] - grid[0]) == pytest.approx([0.75, 0.25], abs=1e-3)
    assert "200 objects" in page.text
    assert "0 objects" in page.text
    assert "operating point: 50 of 200 found" in page.text


def test_ap_of_a_size_without_objects_has_no_bar() -> None:
    page = Page(ap_bars({"small": 0.5, "large": None}, "AP by size"))
    assert len(page.of("rect")) == 1
    assert "no objects" in page.text


def test_what_an_error_costs_shows_in_its_bar() -> None:
    page = Page(
        error_table(ErrorTypes(0.5, {"class": 3, "missed": 1234}, {"class": 0.05, "missed": 0.2, HOSTILE: 0.0}))
    )
    widths = [re.findall(r"width:([\d.]+)%", bar["style"] or "") for bar in page.of("i")]
    assert widths == [["25.0"], ["100.0"], ["0.0"]]
    assert "1,234" in page.text
    assert HOSTILE in page.text
    assert not page.of("script")


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_no_count_of_a_confusion_is_lost(num_classes: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 50, (num_classes + 1, num_classes + 1))
    counts[-1, -1] = 0
    text = confusion_table(Confusion(tuple(f"n{i}" for i in range(num_classes)), counts.tolist()))
    cells = [int(cell) for cell in re.findall(r'class="shade"[^>]*>(\d+)<', text.replace(",", ""))]
    assert sum(cells) == counts.sum()
    assert ("are added up" in text) == (num_classes > MAX_CONFUSED_CLASSES)
    assert text.count("<tr>") == min(num_classes, MAX_CONFUSED_CLASSES + 1) + 2


def test_the_most_confused_of_many_classes_are_shown() -> None:
    counts = np.diag(np.full(41, 100))
    counts[30, 35], counts[-1, -1] = 7, 0
    # Misses and false positives are no confusions.
    counts[3, -1], counts[-1, 4] = 500, 500
    text = Page(confusion_table(Confusion(tuple(f"n{i}" for i in range(40)), counts.tolist()))).text
    assert "Of 40 classes the 12 that are confused with others most often" in text
    assert {"n30", "n35"} <= set(text.split())
    assert not {"n20", "n39"} & set(text.split())


def test_letters_on_the_darkest_cell_can_be_read() -> None:
    red, green, blue, alpha = map(float, re.findall(r"[\d.]+", shaded(1.0, ""))[:4])

    def luminance(*rgb: float) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in rgb)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    cell = luminance(*(255 * (1 - alpha) + part * alpha for part in (red, green, blue)))
    assert (cell + 0.05) / (luminance(0x1B, 0x1F, 0x24) + 0.05) > 4.5


def test_reliability_stands_at_mean_score_and_precision() -> None:
    bins = [
        ReliabilityBin(0.0, 0.5, 1000, 0.25, 0.125), ReliabilityBin(0.5, 0.75, 0, None, None),
        ReliabilityBin(0.75, 1.0, 1, 0.875, 1.0),
    ]  # fmt: skip
    page = Page(reliability_chart(Reliability(bins, 0.1)))
    diagonal, line = (points(line) for line in page.of("polyline"))
    places = (line - diagonal[0]) / (diagonal[1] - diagonal[0])
    np.testing.assert_allclose(places, [[0.25, 0.125], [0.875, 1.0]], atol=1e-3)
    heights = [float(bar["height"] or 0) for bar in page.of("rect")]
    assert heights[0] > heights[2] >= 1 > heights[1] == 0
    assert "no detections" in Page(reliability_chart(Reliability([], None))).text


def test_the_operating_point_stands_on_the_inspection_curve() -> None:
    here = InspectionPoint(0.5, 0.25, 0.125, 0.1)
    curve = [InspectionPoint(0.0, 0.0, 1.0, 3.0), InspectionPoint(0.9, 1.0, 0.0, 0.0)]
    page = Page(inspection_chart(Inspection(8, 8, here, curve)))
    (line,) = (points(line) for line in page.of("polyline"))
    (marked,) = page.of("circle", r="7")
    assert [float(marked["cx"] or 0), float(marked["cy"] or 0)] == pytest.approx(line[1], abs=0.1)
    (right, bottom), (left, top) = line[0], line[-1]
    np.testing.assert_allclose((line[1] - [left, bottom]) / [right - left, top - bottom], [0.125, 0.25], atol=1e-3)


def test_files_that_only_draw_have_no_part_in_a_score() -> None:
    """They are left out of the hash that score keys hold."""
    folder = Path(__file__).parents[3] / "evaluation"
    assert all((folder / name).is_file() for name in _NO_PART)
    scoring = [path for path in folder.glob("*.py") if path.name not in _NO_PART]
    modules = {Path(name).stem for name in _NO_PART}
    for path in scoring:
        assert not modules & set(re.findall(r"from evaluation\.(\w+) import", path.read_text())), path

"""Pictures of errors, by what is embedded and where it is marked."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from reports import Page, found

from evaluation.error_pictures import (
    ENLARGED_PX,
    MAX_BYTES_PER_PX,
    NUM_ENLARGED,
    STYLES,
    Mark,
    enlarged,
    legend,
    marks_of,
    shown_zoom,
    whole,
    worst,
)
from evaluation.matching import ImageMatches, match

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
NOISE = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
NAMES = {1: "car", 2: "<b>bus</b>"}


def lab(colour: str, seen: list[list[float]]) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(np.array(seen) @ linear, 1e-3, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def decoded(uri: str | None) -> Any:
    return cv2.imdecode(np.frombuffer(base64.b64decode((uri or "").partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("seen", SEEN)
def test_outcomes_are_told_apart_by_everybody(seen: str) -> None:
    colours = [lab(STYLES[outcome].colour, SEEN[seen]) for outcome in ("hit", "miss", "false")]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(colours, 2)) > 30


def test_outcomes_are_told_apart_without_colours() -> None:
    assert len({style.dashes for style in STYLES.values()}) == len(STYLES)
    assert len({STYLES[outcome].marker for outcome in ("hit", "miss", "false")}) == 3


def test_the_worst_images_are_those_with_most_errors() -> None:
    few = ImageMatches(1, hits=[(0, 0)] * 5, misses=[5])
    worse = ImageMatches(2, hits=[(0, 0)], misses=[5])
    most = ImageMatches(3, misses=[1, 2], false_positives=[3])
    fine = ImageMatches(4, hits=[(0, 0)])
    assert worst([few, worse, most, fine, ImageMatches(5)], 9) == [most, worse, few]
    assert worst([few, worse, most], 1) == [most]


def test_every_outcome_is_marked_once() -> None:
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "ignore_regions_xywh": [[80, 60, 40, 30]]}],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "<b>bus</b>"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10]},
            {"image_id": 1, "category_id": 2, "bbox": [40, 10, 10, 10]},
            {"image_id": 1, "category_id": 1, "bbox": [90, 70, 10, 10]},
        ],
    }
    detections = [found(1, 1, [10, 10, 10, 11]), found(1, 1, [60, 10, 9, 9]), found(1, 1, [100, 75, 9, 9])]
    (outcome,) = match(truth, detections, ignore_rule="covered-half", score_threshold=0.5)
    marks = marks_of(outcome, truth["annotations"], detections, NAMES)
    assert [(mark.outcome, mark.title) for mark in marks] == [
        ("ignored", "not scored: car, 10x10 px"), ("ignored", "not scored: car 0.90, 9x9 px"),
        ("hit", "found: car 0.90, 10x11 px"), ("false", "false positive: car 0.90, 9x9 px"),
        ("miss", "missed: <b>bus</b>, 10x10 px"),
    ]  # fmt: skip
    assert marks[2].box_xywh_px == detections[0]["bbox"]
    page = Page(whole(NOISE, marks, truth["images"][0]["ignore_regions_xywh"], "1.png", 240))
    assert not page.problems
    assert not page.of("b")
    assert len(page.of("rect")) == len(marks) + 1
    assert page.of("rect", x="40", y="10", width="10", height="10")
    assert page.of("rect", **{"class": "ignored"}) == [
        {"x": "80", "y": "60", "width": "40", "height": "30", "class": "ignored"}
    ]
    for group in ("hit", "miss", "false", "ignored"):
        assert page.of("g", **{"class": group})[0]["stroke"] == STYLES[group].colour


def test_a_picture_is_shown_as_it_is_and_its_boxes_in_its_pixels() -> None:
    page = Page(whole(NOISE, [], [], '"quoted".png', 240))
    (svg,), (image,) = page.of("svg"), page.of("image")
    assert svg["viewbox"] == "0 0 120 90"
    assert (svg["width"], svg["height"], svg["aria-label"]) == ("240", "180", '"quoted".png')
    assert decoded(image["href"]).shape == NOISE.shape
    assert shown_zoom(NOISE, 800) == 3.0
    assert shown_zoom(np.zeros((1800, 1000, 3), np.uint8), 800) == 0.5


def test_a_picture_that_does_not_compress_is_made_smaller() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    (image,) = Page(whole(noise, [], [], "", 800)).of("image")
    assert len(image["href"] or "") <= MAX_BYTES_PER_PX * 800
    assert (image["width"], image["height"]) == ("2000", "1500")


def test_small_misses_are_enlarged_to_whole_pixels() -> None:
    box = [50.0, 40.0, 4.0, 3.0]
    rows = [{"bbox": box, "category_id": 2}, {"bbox": [0.0, 0.0, 40.0, 40.0], "category_id": 1}]
    page = Page(enlarged(NOISE, [Mark("miss", box, "here"), Mark("hit", [0, 0, 5, 5], "far")], rows, NAMES, 2.0))
    (svg,), (image,) = page.of("svg"), page.of("image")
    left, top, width, height = map(int, (svg["viewbox"] or "").split())
    np.testing.assert_array_equal(decoded(image["href"]), NOISE[top : top + height, left : left + width])
    zoom = ENLARGED_PX // width
    assert (svg["width"], svg["height"]) == (f"{zoom * width}", f"{zoom * height}")
    assert 54 - width <= left <= 50
    assert 43 - height <= top <= 40
    assert "here" in page.text
    assert "far" not in page.text
    assert f"<b>bus</b> 4x3 px, {zoom}x" in page.text
    (scale,) = page.of("i")
    assert f"{int((scale['style'] or '')[6:-2]) // zoom} px" in page.text


def test_the_smallest_are_enlarged_first_also_at_the_edge() -> None:
    rows = [{"bbox": [112.0, 80.0, 9.0 - n, 9.0 - n], "category_id": 1} for n in range(8)]
    page = Page(enlarged(NOISE, [], rows, NAMES, 1.0))
    assert [text for text in page.text.split() if "x" in text and text[0].isdigit() and text[-1].isdigit()] == [
        f"{n}x{n}" for n in range(2, 2 + NUM_ENLARGED)
    ]
    for svg in page.of("svg"):
        left, top, width, height = map(int, (svg["viewbox"] or "").split())
        assert left + width <= 120
        assert top + height <= 90
    assert enlarged(NOISE, [], [], NAMES, 1.0) == ""
    assert Page(enlarged(NOISE[:5, :7], [], [{"bbox": [0, 0, 3, 3], "category_id": 1}], NAMES, 1.0)).of("image")


def test_the_legend_names_every_style() -> None:
    page = Page(legend())
    assert not page.problems
    assert all(style.words in page.text for style in STYLES.values())

"""The report of a run and the comparison of two: complete, self-contained, escaped and small."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from reports import Page, analysis, found, scene, split_report

from data.decode import UndecodableImage
from evaluation.comparison_page import Side, write_comparison
from evaluation.matching import match
from evaluation.report_page import ExtraPicture, write_report
from evaluation.significance import Comparison, Difference

HOSTILE = "</title><script>alert('$x')</script>"
FILE = "a'b&<i>\".png"
SECTIONS = [
    "The number", "Where AP is lost", "Sizes", "Classes", "Thresholds", "Confusion", "Reliability of scores",
    "Inspection", "Worst images of test",
]  # fmt: skip
SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, Any]:
    return scene(tmp_path / "images", ["1.png", FILE, "3.png"], ["car", HOSTILE])


def report(folder: Path, *splits: Any, **options: Any) -> Page:
    path = folder / "report.html"
    write_report(path, "csf-net-s", splits, folder / "images", **options)
    return Page(path.read_text())


def check_self_contained(page: Page) -> None:
    assert not page.problems
    assert not {"script", "link", "a", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert addresses
    assert all((address or "").startswith("data:image/") for address in addresses)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "default-src 'none'" in str(page.of("meta"))


def labels(page: Page) -> list[str]:
    return [svg.get("aria-label") or "" for svg in page.of("svg")]


def test_the_page_is_complete_and_needs_nothing_from_elsewhere(tmp_path: Path, truth: dict[str, Any]) -> None:
    hits = [found(i, 1, [10.0, 20.0, 8.0, 8.0]) for i in (1, 2, 3)]
    png = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    page = report(
        tmp_path, split_report(truth, hits, "val"), split_report(truth, hits[:1], dataset=HOSTILE),
        speed={"p50_ms": 12.5}, extra_pictures=[ExtraPicture(HOSTILE, png, "What it shows.")],
    )  # fmt: skip
    check_self_contained(page)
    text = (tmp_path / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == [*SECTIONS[:-1], "Foreground and class score", SECTIONS[-1]]
    assert not re.findall(r"https?:|url\(|@import", text)
    assert page.text.count(HOSTILE) >= 10
    for words in ("0123456789ab", "v1", "coco/AP_small", "covered-half", "p50 ms 12.5", "What it shows."):
        assert words in page.text
    # 1 of 3 cars found in two images, none of both others: the worst images come first.
    pictures = [label for label in labels(page) if "false positives" in label]
    assert pictures == [
        f"{FILE}: 3 missed, 0 false positives, 0 found", "3.png: 3 missed, 0 false positives, 0 found",
        "1.png: 2 missed, 0 false positives, 1 found",
    ]  # fmt: skip
    assert all(svg.get("aria-label") or svg.get("class") == "sample" for svg in page.of("svg"))
    assert all(image["alt"] for image in page.of("img"))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, truth: dict[str, Any]) -> None:
    pages = []
    for _ in range(2):
        report(tmp_path, split_report(truth, [found(1, 1, [0.0, 0.0, 9.0, 9.0])]))
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize("num_objects", [0, 9])
@pytest.mark.parametrize("num_detections", [0, 500])
def test_a_split_with_nothing_in_it(
    tmp_path: Path, truth: dict[str, Any], num_objects: int, num_detections: int
) -> None:
    truth["annotations"] = truth["annotations"][:num_objects]
    rng = np.random.default_rng(0)
    crowd = [found(1, 1, [float(x), float(y), 3.0, 3.0]) for x, y in rng.uniform(0, 90, (num_detections, 2))]
    page = report(tmp_path, split_report(truth, crowd))
    assert not page.problems
    assert ("No errors" in page.text) == (not num_objects and not num_detections)
    assert ("no ground truth" in page.text.lower()) == (not num_objects)
    assert sum(f"false positive: {name}" in page.text for name in ("car",)) == bool(num_detections)


def test_eighty_classes_are_readable(tmp_path: Path) -> None:
    truth = scene(tmp_path / "images", [f"{i}.png" for i in range(30)], [f"class {i}" for i in range(80)])
    page = report(tmp_path, split_report(truth, [found(1, 1, [10.0, 20.0, 8.0, 8.0])]))
    assert not page.problems
    assert "Of 80 classes the 12" in page.text
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_twelve_pictures_of_noise_with_500_boxes_each_stay_small(tmp_path: Path) -> None:
    truth = scene(tmp_path / "images", ["noise.png"], ["car"], (1920, 1080))
    boxes = np.random.default_rng(0).uniform(0, 1000, (500, 2)).tolist()
    report(tmp_path, split_report(truth, [found(1, 1, [*box, 9.0, 9.0]) for box in boxes]))
    drawn = (tmp_path / "report.html").stat().st_size
    report(tmp_path, split_report(truth, []), num_images=0)
    assert 12 * (drawn - (tmp_path / "report.html").stat().st_size) < 5e6


def test_pictures_that_cannot_be_drawn_are_named(tmp_path: Path, truth: dict[str, Any]) -> None:
    (tmp_path / "images" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(UndecodableImage, match=r"3\.png"):
        report(tmp_path, split_report(truth, []))
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        report(tmp_path, split_report(truth, []))
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="at least one scored split"):
        report(tmp_path)


def test_pictures_use_the_operating_point() -> None:
    assert analysis(["car"]).operating_point.shown_score == 0.5
    assert analysis(["car"], has_objects=False).operating_point.shown_score == 0.3


def test_a_threshold_of_another_split_is_shown_once(tmp_path: Path, truth: dict[str, Any]) -> None:
    page = report(tmp_path, split_report(truth, [], "val"), split_report(truth, []))
    assert page.text.count("chosen on val") == 1


def compare(folder: Path, truth: dict[str, Any], a: Any, b: Any, **options: Any) -> Page:
    path = folder / "compare.html"
    sides = (Side(HOSTILE, a, 0.5), Side("B", b, 0.25))
    difference = Difference(0.25, 0.5, 0.25, 0.125, 0.375, 1.0, 1000, "better")
    classes = {HOSTILE: {"coco/AP50": difference}, "bus": {"coco/AP50": Difference(*[None] * 6, 0, None)}}
    comparison = Comparison(8, 8, 1000, 0, 0.95, {"coco/AP": difference}, classes)
    options |= {"scored_on": "tiny test", "ignore_rule": "covered-half", "comparison": comparison}
    options |= {"notes": ["warning: of only 8 images", HOSTILE]}
    options |= {"facts": {"parameters": [(HOSTILE, "1", HOSTILE)], "data": []}}
    write_comparison(path, folder / "images", truth, sides, **options)
    return Page(path.read_text())


def test_two_runs_are_counted_and_shown_where_they_differ_most(tmp_path: Path, truth: dict[str, Any]) -> None:
    boxes = [[10.0 + 30 * n, 20.0, 8.0, 8.0] for n in range(3)]
    label = [1, 2, 1]
    a = [found(1, label[0], boxes[0]), found(2, label[0], boxes[0]), found(2, label[1], boxes[1])]
    b = [found(1, label[0], boxes[0], 0.3), found(2, label[2], boxes[2], 0.3), found(3, 1, [0.0, 0.0, 5.0, 5.0], 0.3)]
    page = compare(tmp_path, truth, a, b)
    check_self_contained(page)
    assert "coco/AP 0.250 0.500 +0.250 +0.125 to +0.375 better" in page.text
    assert "They are the same." in page.text
    assert f"{HOSTILE}: coco/AP50 0.250 0.500 +0.250 +0.125 to +0.375 better" in page.text
    assert "bus: coco/AP50" not in page.text
    assert "would give. warning: of only 8 images" in page.text
    assert re.search(r"found by both 1 only by .*? 2 only by B 1 by neither 5", page.text)
    assert re.search(r"scores from 0.500 0 false positives of B, scores from 0.250 1", page.text)
    assert [label for label in labels(page) if " on " in label] == [
        f"{HOSTILE} on {FILE}: 1 missed, 0 false positives, 2 found",
        f"B on {FILE}: 2 missed, 0 false positives, 1 found",
        f"{HOSTILE} on 3.png: 3 missed, 0 false positives, 0 found",
        "B on 3.png: 3 missed, 1 false positives, 0 found",
    ]


def test_what_both_did_not_find_adds_up(tmp_path: Path, truth: dict[str, Any]) -> None:
    """Against a loop over the objects."""
    rng = np.random.default_rng(3)
    runs = [[found(a["image_id"], a["category_id"], a["bbox"]) for a in truth["annotations"] if rng.uniform() < share]
            for share in (0.7, 0.4)]  # fmt: skip
    hits = [
        {row for outcome in match(truth, run, ignore_rule="none", score_threshold=0.25) for row, _ in outcome.hits}
        for run in runs
    ]
    both, only_a, only_b = len(hits[0] & hits[1]), len(hits[0] - hits[1]), len(hits[1] - hits[0])
    neither = len(truth["annotations"]) - len(hits[0] | hits[1])
    page = compare(tmp_path, truth, *runs)
    assert re.search(rf"by both {both} only by .*? {only_a} only by B {only_b} by neither {neither}", page.text)


def test_two_equal_runs_do_not_differ(tmp_path: Path, truth: dict[str, Any]) -> None:
    same = [found(1, 1, [10.0, 20.0, 8.0, 8.0])]
    page = compare(tmp_path, truth, same, same)
    assert "No image has another outcome." in page.text
    assert not page.of("image")


@pytest.mark.skipif(not (SHARED / "aerial_cars").is_dir(), reason=f"no real data at {SHARED / 'aerial_cars'}")
def test_real_pictures_make_a_small_page(tmp_path: Path) -> None:
    pictures = sorted((SHARED / "aerial_cars").rglob("*.jpg"))[:12]
    truth = scene(tmp_path / "images", [], ["car"])
    for number, picture in enumerate(pictures, 1):
        (tmp_path / "images" / f"{number}.jpg").symlink_to(picture)
        truth["images"].append({"id": number, "file_name": f"{number}.jpg"})
        truth["annotations"].append({"image_id": number, "category_id": 1, "bbox": [500.0, 300.0, 20.0, 9.0]})
    page = report(tmp_path, split_report(truth, []))
    assert not page.problems
    assert len(page.of("image")) == 2 * len(pictures)
    assert (tmp_path / "report.html").stat().st_size < 5e6

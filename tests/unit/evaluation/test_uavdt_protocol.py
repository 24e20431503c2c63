"""UAVDT's protocol against the official toolkit's own output, its wrong readings, and a plain loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation import uavdt
from evaluation.score_files import read_files
from evaluation.tables import DetectionTable, Tables, TruthTable, tabulate
from evaluation.uavdt import NO_CLASS, lies_inside, score_uavdt

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
FIXTURE = SHARED / "uavdt_small"


@cache
def official() -> tuple[dict[str, Any], Tables]:
    if not FIXTURE.is_dir():
        pytest.skip(f"{FIXTURE} is absent: the toolkit's output is not part of the project")
    files = read_files(FIXTURE / "GT", FIXTURE / "detections", None, with_others=False)
    return json.loads((FIXTURE / "expected.json").read_text()), files.tables


def overall(tables: Tables) -> float:
    return 100 * (score_uavdt(tables).metrics["uavdt/AP70"] or 0)


def test_all_numbers_equal_the_official_toolkit() -> None:
    expected, tables = official()
    scored = score_uavdt(tables)
    assert overall(tables) == pytest.approx(expected["overall"]["AP"], abs=1e-9, rel=0)
    assert scored.counts["num_ground_truths"] == expected["overall"]["objects_counted"]
    assert scored.counts["num_detections"] == expected["overall"]["detections_left"]
    assert scored.counts["num_hits"] == expected["overall"]["true_positives"]
    for name, values in scored.per_class.items():
        category, aware = expected["official_category"][name], expected["class_aware_numpy_only"][name]
        assert 100 * (values["uavdt/AP70_category"] or 0) == pytest.approx(category["AP"], abs=1e-9, rel=0)
        assert 100 * (values["uavdt/AP70_class_aware"] or 0) == pytest.approx(aware["AP"], abs=1e-9, rel=0)
        assert values["num_ground_truths"] == aware["objects"]
    mean = np.mean([aware["AP"] for name, aware in expected["class_aware_numpy_only"].items() if name != "note"])
    assert 100 * (scored.metrics["uavdt/AP70_class_aware"] or 0) == pytest.approx(mean, abs=1e-9, rel=0)


def test_coco_on_three_classes_comes_from_the_same_files() -> None:
    _, tables = official()
    assert tables.class_names == ("car", "truck", "bus")
    assert (tables.detections.label >= 0).all()


def not_strictly(boxes: NDArray[Any], regions: NDArray[Any]) -> NDArray[Any]:
    boxes, regions = boxes[:, None], regions[None]
    begins, ends = boxes[..., :2] >= regions[..., :2], (boxes + np.roll(boxes, 2, -1))[..., :2] <= corners(regions)
    inside: NDArray[Any] = (begins & ends).all(axis=2).any(axis=1)
    return inside


def corners(boxes: NDArray[Any]) -> NDArray[Any]:
    second: NDArray[Any] = boxes[..., :2] + boxes[..., 2:]
    return second


def by_centre(boxes: NDArray[Any], regions: NDArray[Any]) -> NDArray[Any]:
    centres, regions = (boxes[:, :2] + boxes[:, 2:] / 2)[:, None], regions[None]
    inside: NDArray[Any] = ((centres > regions[..., :2]) & (centres < corners(regions))).all(axis=2).any(axis=1)
    return inside


def nowhere(boxes: NDArray[Any], _: NDArray[Any]) -> NDArray[Any]:
    return np.zeros(len(boxes), bool)


@pytest.mark.parametrize(
    ("reading", "name", "wrong"),
    [
        ("ignore regions applied to M0801 too", "IGNORE_REGIONS_NOT_READ", ()),
        ("ignore regions not applied at all", "lies_inside", nowhere),
        ("IoU 0.5", "MIN_IOU", 0.5),
        ("containment not strict", "lies_inside", not_strictly),
        ("dropped by box centre", "lies_inside", by_centre),
    ],
)
def test_a_wrong_reading_gives_the_wrong_number(
    monkeypatch: pytest.MonkeyPatch, reading: str, name: str, wrong: object
) -> None:
    expected, tables = official()
    right = overall(tables)
    monkeypatch.setattr(uavdt, name, wrong)
    assert overall(tables) - right == pytest.approx(expected["sensitivity"]["changes"][reading], abs=1e-9, rel=0)


@pytest.mark.parametrize(
    ("box_xywh_px", "inside"),
    [
        ([11, 11, 18, 28], True),
        ([10, 11, 18, 28], False),
        ([11, 10, 18, 28], False),
        ([11, 11, 19, 28], False),
        ([11, 11, 18, 29], False),
        ([11, 11, 20, 28], False),
    ],
)
def test_a_box_that_touches_a_side_of_a_region_is_not_inside(box_xywh_px: list[int], inside: bool) -> None:
    regions = np.array([[10, 10, 20, 30], [200, 200, 5, 5]], float)
    assert lies_inside(np.array([box_xywh_px], float), regions).tolist() == [inside]


def test_the_regions_of_two_sequences_are_not_read() -> None:
    sequences = ("M0203", "M0209", "M0801")
    images = [
        {"id": i, "file_name": f"{name}/img000001.jpg", "width": 100, "height": 100,
         "ignore_regions_xywh": [[0, 0, 50, 50]]}
        for i, name in enumerate(sequences)
    ]  # fmt: skip
    truth = {"images": images, "categories": [{"id": 1, "name": "car"}], "annotations": []}
    for i, name in enumerate(sequences):
        found = [{"image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.9}]
        num_dropped = score_uavdt(tabulate(truth, found)).counts["num_ignored_detections"]
        assert num_dropped == int(name == "M0203"), name


def test_means_over_classes_and_ties_in_reverse_order_are_other_numbers() -> None:
    expected, tables = official()
    scored, right = score_uavdt(tables), overall(tables)
    changes = expected["sensitivity"]["changes"]
    aware = 100 * (scored.metrics["uavdt/AP70_class_aware"] or 0)
    assert aware - right == pytest.approx(changes["mean of class-aware APs"], abs=1e-9, rel=0)
    category = 100 * np.mean([values["uavdt/AP70_category"] for values in scored.per_class.values()])
    assert category - right == pytest.approx(changes["mean of official category APs"], abs=1e-9, rel=0)

    def backwards(table: Any) -> Any:
        turned = table.take(np.arange(len(table.image))[::-1])
        return turned._replace(image=len(tables.image_ids) - 1 - turned.image)

    reverse = tables._replace(
        truths=backwards(tables.truths), detections=backwards(tables.detections), file_names=tables.file_names[::-1],
        ignore_regions_xywh_px=tables.ignore_regions_xywh_px[::-1],
    )  # fmt: skip
    assert overall(reverse) - right == pytest.approx(changes["ties in reverse order"], abs=1e-9, rel=0)


def iou(one: NDArray[Any], other: NDArray[Any]) -> float:
    w, h = np.minimum(corners(one), corners(other)) - np.maximum(one[:2], other[:2])
    overlap = max(w, 0) * max(h, 0)
    return float(overlap / (one[2] * one[3] + other[2] * other[3] - overlap))


def plain_ap(tables: Tables, may_match: Callable[[int, int], bool], rows: list[int], num_truths: int) -> float:
    """Greedy by score over all images at IoU .70, then the area under the curve, as loops."""
    truths, found = tables.truths, tables.detections
    free = set(range(len(truths.label)))
    hits = []
    for row in sorted(rows, key=lambda row: (-found.scores[row], found.image[row], row)):
        best, taken = 0.7, None
        for g in sorted(free):
            overlap = iou(found.boxes_xywh_px[row], truths.boxes_xywh_px[g])
            if truths.image[g] == found.image[row] and may_match(row, g) and overlap >= best:
                best, taken = overlap, g
        hits.append(taken is not None)
        free -= {taken}  # type: ignore[arg-type]
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    return sum(max(precision[k:]) for k, hit in enumerate(hits) if hit) / num_truths


@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_truths, num_found, num_images = 40, 120, 5
    boxes = np.concatenate([rng.integers(0, 80, (num_truths, 2)), rng.integers(8, 40, (num_truths, 2))], 1) * 1.0
    image, label = rng.integers(0, num_images, num_truths), rng.integers(0, 3, num_truths)
    source = rng.integers(0, num_truths, num_found)
    found = boxes[source] + rng.integers(-2, 3, (num_found, 4)) * (rng.random((num_found, 1)) < 0.8)
    guessed = np.where(rng.random(num_found) < 0.8, label[source], rng.integers(0, 3, num_found))
    tables = Tables(
        TruthTable(image, label, boxes, boxes[:, 2:].prod(axis=1), np.zeros(num_truths, bool)),
        DetectionTable(image[source], guessed, found, rng.integers(0, 10, num_found) / 10),
        np.arange(num_images), tuple(f"s/{i}.jpg" for i in range(num_images)), np.zeros((num_images, 2), np.int64),
        (np.empty((0, 4)),) * num_images, np.arange(1, 4), ("car", "truck", "bus"),
    )  # fmt: skip
    scored, everything = score_uavdt(tables), list(range(num_found))
    assert scored.metrics["uavdt/AP70"] == pytest.approx(
        plain_ap(tables, lambda _, __: True, everything, num_truths), abs=1e-12
    )
    for c, name in enumerate(tables.class_names):
        mine = [row for row in everything if guessed[row] == c]
        own = plain_ap(tables, lambda _, g, c=c: label[g] == c, mine, int((label == c).sum()))  # type: ignore[misc]
        official_ap = plain_ap(tables, lambda _, g, c=c: label[g] == c, everything, num_truths)  # type: ignore[misc]
        assert scored.per_class[name]["uavdt/AP70_class_aware"] == pytest.approx(own, abs=1e-12)
        assert scored.per_class[name]["uavdt/AP70_category"] == pytest.approx(official_ap, abs=1e-12)


def test_without_classes_the_class_aware_numbers_are_left_out_and_nothing_else_changes() -> None:
    _, tables = official()
    found = tables.detections._replace(label=np.full_like(tables.detections.label, NO_CLASS))
    known, unknown = score_uavdt(tables), score_uavdt(tables._replace(detections=found))
    assert list(unknown.metrics) == ["uavdt/AP70"]
    assert unknown.metrics["uavdt/AP70"] == known.metrics["uavdt/AP70"]
    for name, values in unknown.per_class.items():
        assert "uavdt/AP70_class_aware" not in values
        assert values["uavdt/AP70_category"] == known.per_class[name]["uavdt/AP70_category"]

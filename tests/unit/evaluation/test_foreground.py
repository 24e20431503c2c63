"""Foreground and class score of objects against a loop over anchor points, and the report against counts by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import models
from data.batch import Batch, collate
from data.loader import DetectionDataset
from data.tiled_pictures import TiledPictures
from data.tiling import TileGrid
from evaluation import foreground
from evaluation.detector import detect
from evaluation.foreground import ForegroundObserver, ForegroundReport, ObjectScore, foreground_report
from evaluation.matching import match
from models.boxes import anchor_centers, anchor_grid
from models.interface import AnchorScores, Detections, PostprocessConfig

CPU = torch.device("cpu")
SIDE_PX = 64
# 64 + 16 + 4 anchor points.
CENTRES = anchor_centers(*anchor_grid([(8, 8), (4, 4), (2, 2)], [8, 16, 32], CPU))
NUM_CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Known(nn.Module):
    """Its predictions are its scores: those given, of one image after the other."""

    num_classes = NUM_CLASSES
    strides = (8, 16, 32)

    def __init__(self, foreground: Tensor, classes: Tensor) -> None:
        super().__init__()
        self.foreground, self.classes, self.seen = foreground, classes, 0

    def forward(self, images: Tensor) -> AnchorScores:
        part = slice(self.seen, self.seen + len(images))
        self.seen += len(images)
        return AnchorScores(CENTRES, self.foreground[part], self.classes[part])

    def postprocess(self, predictions: AnchorScores, *_: PostprocessConfig) -> list[Detections]:
        none = torch.zeros(0)
        return [Detections(torch.zeros(0, 4), none, none.long()) for _ in predictions.foreground]

    def anchor_scores(self, predictions: AnchorScores) -> AnchorScores:
        return predictions


def truth(*objects: tuple[int, int, list[float]], **more: Any) -> dict[str, Any]:
    """One annotation per (image_id, category_id, bbox); ids begin at 1."""
    return {
        "images": [{"id": i} for i in sorted({image_id for image_id, _, _ in objects})],
        "categories": [{"id": 10 * (c + 1), "name": f"class-{c}"} for c in range(NUM_CLASSES)],
        "annotations": [
            {"id": i, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[2] * bbox[3]} | more
            for i, (image_id, category_id, bbox) in enumerate(objects, start=1)
        ],
    }


def batch(image_ids: tuple[int, ...], scales: list[float], original_hw: tuple[tuple[int, int], ...]) -> Batch:
    empty, index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return Batch(
        images=torch.zeros(len(image_ids), 3, SIDE_PX, SIDE_PX, dtype=torch.uint8), boxes_xyxy_px=empty, labels=index,
        image_index=index, ignore_xyxy_px=empty, ignore_image_index=index, image_ids=image_ids,
        scales=torch.tensor(scales), original_hw=original_hw,
    )  # fmt: skip


def observed(
    detector: Known, ground_truth: dict[str, Any], batches: list[Batch] | None = None, bf16: bool = False
) -> list[ObjectScore]:
    observer = ForegroundObserver(detector, ground_truth)
    batches = batches or [batch((1,), [1.0], ((SIDE_PX, SIDE_PX),))]
    detect(detector, batches, PostprocessConfig(), device=CPU, bf16=bf16, observer=observer)
    return observer.rows


def finest(*foreground: float) -> Known:
    """Only the first anchor points, of 8 px, speak: with these foreground scores, and surely for every class."""
    known = torch.zeros(1, len(CENTRES))
    known[0, : len(foreground)] = torch.tensor(foreground)
    return Known(known, torch.ones(1, len(CENTRES), NUM_CLASSES))


def scores(num_images: int = 1, seed: int = 0) -> Known:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, len(CENTRES))
    return Known(torch.rand(*shape, generator=generator), torch.rand(*shape, NUM_CLASSES, generator=generator))


def expected(detector: Known, image: int, scale: float, annotation: dict[str, Any]) -> tuple[float, float]:
    """By a loop over anchor points; a little over 8 px are a cell of the finest level."""
    x, y, w, h = (scale * value for value in annotation["bbox"])
    label = annotation["category_id"] // 10 - 1
    pairs = [
        (float(detector.foreground[image, point]), float(detector.classes[image, point, label]))
        for point, (cx, cy) in enumerate(CENTRES.tolist())
        if 2 * abs(cx - x - w / 2) < max(w, 8.016) and 2 * abs(cy - y - h / 2) < max(h, 8.016)
    ]
    return max(pairs, key=lambda pair: pair[0] * pair[1])


BOX = st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([10, 20, 30]), BOX), max_size=12),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.integers(0, 99),
)
def test_rows_equal_a_loop_over_anchor_points(
    objects: list[tuple[int, int, tuple[int, ...]]], scale: float, seed: int
) -> None:
    """Boxes in eighths of the input's pixels, so that no box edge or distance hangs on the last bit."""
    boxes = [(i, c, [min(v, 511 - (0, 0, x, y)[k]) / 8 / scale for k, v in enumerate((x, y, w, h))])
             for i, c, (x, y, w, h) in objects]  # fmt: skip
    ground_truth, detector, side = truth(*boxes), scores(3, seed), int(SIDE_PX / scale)
    batches = [batch((3, 1), [scale, scale], ((side, side),) * 2), batch((2,), [scale], ((side, side),))]
    rows = observed(detector, ground_truth, batches)
    by_id = {row.annotation_id: (row.foreground, row.class_score) for row in rows}
    assert len(by_id) == len(rows) == len(ground_truth["annotations"])
    for annotation in ground_truth["annotations"]:
        image = [3, 1, 2].index(annotation["image_id"])
        assert by_id[annotation["id"]] == pytest.approx(expected(detector, image, scale, annotation))


@pytest.mark.parametrize(
    ("corner", "asked"),
    [
        # No centre within; around it those of a cell of 8 px and one of 16.
        ((10, 10), [(12, 12), (8, 8)]),
        # In the corner of four cells, and just beside the centre of one of 32 px.
        ((14.5, 14.5), [(12, 12), (20, 12), (12, 20), (20, 20), (16, 16)]),
        # In the corner of the picture.
        ((0, 0), [(4, 4)]),
        ((62, 62), [(60, 60)]),
    ],
)
def test_an_object_smaller_than_a_cell_asks_the_points_around_it(
    corner: tuple[float, float], asked: list[tuple[float, float]]
) -> None:
    points = [CENTRES.tolist().index([x, y]) for x, y in asked]
    for best in points:
        detector = Known(torch.ones(1, len(CENTRES)), torch.ones(1, len(CENTRES), NUM_CLASSES))
        detector.foreground[0, points] = 0.25
        detector.foreground[0, best] = 0.5
        side = 3 if corner == (14.5, 14.5) else 2
        (row,) = observed(detector, truth((1, 10, [*corner, side, side])))
        assert row == ObjectScore(1, 0.5, 1.0)


def test_a_flat_object_asks_all_along_it() -> None:
    detector = Known(torch.ones(1, len(CENTRES)), torch.ones(1, len(CENTRES), NUM_CLASSES))
    inside = [CENTRES.tolist().index([x, 4.0]) for x in (4.0, 12.0, 20.0)]
    detector.foreground[0, inside] = torch.tensor([0.25, 0.125, 0.5])
    assert observed(detector, truth((1, 10, [0, 1, 24, 1]))) == [ObjectScore(1, 0.5, 1.0)]


def test_the_highest_product_counts_not_the_highest_factor() -> None:
    detector = finest(0.9, 0.5)
    detector.classes[0, :2, 2] = torch.tensor([0.1, 0.5])
    (row,) = observed(detector, truth((1, 30, [2, 2, 12, 4])))
    assert row == ObjectScore(1, 0.5, 0.5)


def test_objects_may_share_an_anchor_point_and_each_asks_for_its_own_class() -> None:
    detector = finest(0.5)
    detector.classes[0, 0] = torch.tensor([0.25, 0.75, 1.0])
    rows = observed(detector, truth((1, 10, [3, 3, 2, 2]), (1, 20, [3, 3, 2, 2]), (1, 30, [0, 0, 1, 1])))
    assert rows == [ObjectScore(1, 0.5, 0.25), ObjectScore(2, 0.5, 0.75), ObjectScore(3, 0.5, 1.0)]


def test_more_objects_than_one_block() -> None:
    numbers = [i % 64 for i in range(3 * foreground._BLOCK + 7)]
    known = [(i + 1) / 64 for i in range(64)]
    rows = observed(finest(*known), truth(*((1, 10, [8.0 * (i % 8) + 2, i // 8 * 8.0 + 2, 4, 4]) for i in numbers)))
    assert [row.foreground for row in rows] == [known[i] for i in numbers]


def test_crowds_have_no_row_and_pictures_without_objects_none() -> None:
    ground_truth = truth((1, 10, [2, 2, 4, 4]), (1, 10, [0, 0, 60, 60]), (7, 10, [0, 0, 60, 60]))
    ground_truth["annotations"][1]["iscrowd"] = 1
    batches = [batch((1, 2), [1.0, 1.0], ((SIDE_PX, SIDE_PX),) * 2)]
    assert [row.annotation_id for row in observed(scores(2), ground_truth, batches)] == [1]


def test_what_is_not_a_number_counts_as_zero() -> None:
    rows = observed(finest(float("nan"), 0.5), truth((1, 10, [0, 0, 2, 2]), (1, 10, [2, 2, 12, 4])))
    assert rows == [ObjectScore(1, 0.0, 1.0), ObjectScore(2, 0.5, 1.0)]


@pytest.fixture(scope="module")
def architectures() -> Callable[[str], Any]:
    def build(name: str) -> Any:
        torch.manual_seed(0)
        return models.build(name, num_classes=2)

    return build


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["yolox-nano", "yolov8-n", "foreground-probe-n"])
def test_real_detectors_over_a_split_and_the_way_to_the_report(
    tiny: Any, architectures: Callable[[str], Any], name: str, bf16: bool
) -> None:
    """Every object of the split, and no score that the detector's own detections do not reach."""
    detector = architectures(name)
    config = PostprocessConfig(score_threshold=0, nms_iou=1, max_detections=10_000)
    dataset = DetectionDataset(tiny.folder, "val", input_size_px=SIDE_PX, augment=None, seed=0)
    ground_truth = json.loads((tiny.folder / "annotations" / "val.json").read_text())
    observer = ForegroundObserver(detector, ground_truth)
    loader: Any = DataLoader(dataset, batch_size=3, collate_fn=collate)
    found = detect(detector, loader, config, device=CPU, bf16=bf16, observer=observer).detections
    assert [row.annotation_id for row in observer.rows] == [a["id"] for a in ground_truth["annotations"]]
    best = {image["id"]: max(d["score"] for d in found if d["image_id"] == image["id"])
            for image in ground_truth["images"]}  # fmt: skip
    for row, annotation in zip(observer.rows, ground_truth["annotations"], strict=True):
        assert 0 < row.foreground * row.class_score <= best[annotation["image_id"]] * (1 + 1e-5)

    matches = match(ground_truth, found, ignore_rule="none", score_threshold=0.3)
    annotations = ground_truth["annotations"]
    report = foreground_report(
        observer.rows,
        annotations,
        missed={annotations[row]["id"] for one in matches for row in one.misses},
        found={annotations[row]["id"] for one in matches for row, _ in one.hits},
        score_threshold=0.3,
    )
    assert sum(group.num_objects for group in report.overall.values()) == len(annotations)
    assert report.num_not_scored == 0


@pytest.mark.parametrize("size_px", [32, 4096])
def test_objects_of_tiled_pictures(tiny: Any, size_px: int) -> None:
    """One tile larger than the picture changes nothing; of smaller ones an object has a row wherever it shows."""
    path = tiny.folder / "annotations" / "val.json"
    ground_truth = json.loads(path.read_text())
    grid = TileGrid(size_px=size_px, overlap_px=8)
    dataset = TiledPictures(tiny.folder, "val", grid, input_size_px=SIDE_PX)
    detector: Any = scores(len(dataset))
    observer = ForegroundObserver(detector, ground_truth, dataset.tiles)
    loader: Any = DataLoader(dataset, batch_size=4, collate_fn=collate)
    detect(detector, loader, PostprocessConfig(), device=CPU, bf16=False, observer=observer)

    oracle = []
    for number, (image_id, (x0, y0, width, height)) in enumerate(dataset.tiles):
        scale = SIDE_PX / max(width, height)
        for annotation in ground_truth["annotations"]:
            x, y, w, h = annotation["bbox"]
            x1, y1 = max(x - x0, 0), max(y - y0, 0)
            x2, y2 = min(x + w - x0, width), min(y + h - y0, height)
            if annotation["image_id"] == image_id and x2 > x1 and y2 > y1:
                part = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 10 * annotation["category_id"]}
                oracle.append((annotation["id"], *expected(detector, number, scale, part)))
    assert [row.annotation_id for row in observer.rows] == [row[0] for row in oracle]
    np.testing.assert_allclose([row[1:] for row in observer.rows], [row[1:] for row in oracle], rtol=1e-6)
    assert {row[0] for row in oracle} == {annotation["id"] for annotation in ground_truth["annotations"]}
    assert (len(oracle) > len(ground_truth["annotations"])) == (size_px == 32)


def test_an_object_too_small_for_the_input_has_a_row_all_the_same() -> None:
    """At 64 px of 320 the loader leaves out a box of 4 px."""
    ground_truth = truth((1, 10, [100, 100, 4, 4]), (1, 10, [200, 200, 60, 60]))
    rows = observed(scores(), ground_truth, [batch((1,), [0.2], ((320, 320),))])
    assert [row.annotation_id for row in rows] == [1, 2]


def report(rows: list[tuple[float, float]], sides: list[float], missed: set[int], found: set[int]) -> ForegroundReport:
    """Object i + 1 has row i and a side."""
    ground_truth = truth(*((1, 10, [0, 0, side, side]) for side in sides))
    made = [ObjectScore(i, *row) for i, row in enumerate(rows, start=1)]
    return foreground_report(made, ground_truth["annotations"], missed=missed, found=found, score_threshold=0.3)


def test_shares_by_quadrant_and_medians() -> None:
    made = report(
        [(0.1, 0.9), (0.2, 0.5), (0.3, 0.4), (0.5, 0.1), (0.9, 0.9), (0.7, 0.8), (0.0, 0.0)],
        [4] * 7,
        missed={1, 2, 3, 4, 5},
        found={6},
    )
    missed = made.overall["missed"]
    assert (missed.num_objects, missed.median_foreground, missed.median_class) == (5, 0.3, 0.5)
    # A score of exactly one half is strong.
    shares = (missed.weak_foreground, missed.weak_class, missed.both_weak, missed.none_weak)
    assert shares == (0.4, 0.2, 0.2, 0.2)
    assert asdict(made.overall["found"]) == {
        "num_objects": 1, "weak_foreground": 0, "weak_class": 0, "both_weak": 0, "none_weak": 1,
        "median_foreground": 0.7, "median_class": 0.8,
    }  # fmt: skip
    assert made.points == {
        "missed": [(0.1, 0.9), (0.2, 0.5), (0.3, 0.4), (0.5, 0.1), (0.9, 0.9)],
        "found": [(0.7, 0.8)],
    }
    assert (made.num_points_left_out, made.num_not_scored, made.score_threshold) == (0, 1, 0.3)


def test_buckets_by_size() -> None:
    """A side at a limit belongs to the larger bucket, as in the dataset's statistics."""
    sides = [1, 2, 7.9, 8, 16, 31, 32, 63, 64, 95, 96, 300]
    made = report([(0.1, 0.9)] * 12, [*sides], missed=set(range(1, 13, 2)), found=set(range(2, 13, 2)))
    numbers = {name: sum(group.num_objects for group in groups.values()) for name, groups in made.by_aitod_size.items()}
    assert numbers == {"below 2": 1, "very tiny": 2, "tiny": 1, "small": 2, "medium": 2, "large": 4}
    numbers = {name: sum(group.num_objects for group in groups.values()) for name, groups in made.by_coco_size.items()}
    assert numbers == {"small": 6, "medium": 4, "large": 2}
    assert made.by_aitod_size["below 2"]["missed"].weak_foreground == 1
    assert asdict(made.by_aitod_size["below 2"]["found"]) == {
        "num_objects": 0, "weak_foreground": None, "weak_class": None, "both_weak": None, "none_weak": None,
        "median_foreground": None, "median_class": None,
    }  # fmt: skip


def test_of_several_rows_of_an_object_the_highest_product_counts() -> None:
    rows = [ObjectScore(1, 0.9, 0.1), ObjectScore(1, 0.5, 0.5), ObjectScore(1, 0.1, 0.9), ObjectScore(2, 0.0, 0.0)]
    made = foreground_report(
        rows, truth((1, 10, [0, 0, 4, 4]), (1, 10, [0, 0, 4, 4]))["annotations"], missed={1}, found={2},
        score_threshold=0.3,
    )  # fmt: skip
    assert made.points == {"missed": [(0.5, 0.5)], "found": [(0.0, 0.0)]}


def test_objects_in_ignore_regions_and_crowds_are_neither_missed_nor_found() -> None:
    ground_truth = truth((1, 10, [0, 0, 2, 2]), (1, 10, [40, 40, 9, 9]), (1, 10, [20, 20, 9, 9]))
    ground_truth["images"][0]["ignore_regions_xywh"] = [[38, 38, 20, 20]]
    ground_truth["annotations"][2]["iscrowd"] = 1
    rows = observed(scores(), ground_truth)
    (one,) = match(ground_truth, [], ignore_rule="covered-half", score_threshold=0.3)
    annotations = ground_truth["annotations"]
    made = foreground_report(
        rows, annotations, missed={annotations[row]["id"] for row in one.misses}, found=set(), score_threshold=0.3
    )
    assert made.overall["missed"].num_objects == made.num_not_scored == 1
    assert made.points["missed"] == [(rows[0].foreground, rows[0].class_score)]


def test_a_report_is_json_and_an_empty_one_too() -> None:
    for made in (report([(0.1, 0.9)], [4], {1}, set()), report([], [], set(), set())):
        stored = json.loads(json.dumps(asdict(made), allow_nan=False))
        assert stored["overall"]["missed"]["num_objects"] == len(stored["points"]["missed"])


def test_scored_objects_that_nobody_observed_are_counted() -> None:
    made = report([(0.1, 0.9)], [4, 4, 4], missed={1, 3}, found={2})
    assert made.num_not_observed == 2
    assert (made.overall["missed"].num_objects, made.overall["found"].num_objects) == (1, 0)


def test_of_many_points_some_are_drawn_and_the_others_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreground, "MAX_POINTS", 50)
    rng = np.random.default_rng(1)
    rows = [tuple(row) for row in rng.uniform(size=(400, 2)).tolist()]
    made, again = (report(rows, [4] * 400, set(range(1, 101)), set(range(101, 401))) for _ in range(2))
    assert made == again
    assert sum(len(points) for points in made.points.values()) == 50
    assert made.num_points_left_out == 350
    assert set(made.points["missed"]) <= set(rows[:100])
    assert set(made.points["found"]) <= set(rows[100:])
    assert 3 <= len(made.points["missed"]) <= 25
    assert made.overall["missed"].num_objects == 100

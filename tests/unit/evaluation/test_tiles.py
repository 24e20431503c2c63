from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.decode import UndecodableImage
from data.tiled_pictures import PictureTile, TiledPictures
from data.tiling import TileGrid
from evaluation.detector import Detected
from evaluation.tiles import merge_tiles

COUNTS = {"num_detected_images": 0, "num_dropped_candidates": 3}
# Two tiles of 64 px that share the columns 48 to 64.
GRID = TileGrid(size_px=64, overlap_px=16)
PAIR = [PictureTile(7, tile) for tile in GRID.tiles(112, 64)]


def found(tile: int, box: Sequence[float], score: float, category: int = 1) -> Any:
    return {"image_id": tile, "category_id": category, "bbox": list(box), "score": score}


def merge(*detections: Any, tiles: Any = PAIR, max_detections: int = 100) -> Detected:
    return merge_tiles(Detected(list(detections), dict(COUNTS)), tiles, max_detections=max_detections)


def boxes(merged: Detected) -> list[list[float]]:
    return [detection["bbox"] for detection in merged.detections]


def test_an_object_that_both_tiles_see_whole_is_one() -> None:
    merged = merge(found(0, [50, 10, 10, 10], 0.8), found(1, [3, 11, 10, 10], 0.9))
    assert merged.detections == [{"image_id": 7, "category_id": 1, "bbox": [51, 11, 10, 10], "score": 0.9}]
    assert merged.counts == {
        "num_detected_images": 1, "num_dropped_candidates": 3, "num_tiles": 2, "num_merged_detections": 1,
        "num_detections_over_cap": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("score_of_whole", "score_of_part"), [(0.9, 0.5), (0.5, 0.9)])
def test_a_cut_part_joins_the_whole_whichever_scores_higher(score_of_whole: float, score_of_part: float) -> None:
    """Columns 40 to 60: whole in the first tile, from 48 on in the second. Their own IoU is 0.6, of 12 to 20 px."""
    merged = merge(found(0, [40, 10, 20, 10], score_of_whole), found(1, [0, 10, 12, 10], score_of_part))
    assert boxes(merged) == [[40, 10, 20, 10]]
    assert merged.detections[0]["score"] == 0.9


def test_an_object_larger_than_the_overlap_is_put_together() -> None:
    merged = merge(found(0, [20, 10, 44, 30], 0.6), found(1, [0, 10, 50, 30], 0.7))
    assert boxes(merged) == [[20, 10, 78, 30]]


def test_a_small_object_in_front_of_a_large_one_stays() -> None:
    """All of it lies inside the large one: intersection over the smaller box would be 1."""
    assert len(boxes(merge(found(0, [30, 5, 30, 50], 0.9), found(1, [4, 20, 6, 6], 0.8)))) == 2


def test_classes_and_neighbours_within_a_tile_are_kept_apart() -> None:
    other_class = merge(found(0, [50, 10, 10, 10], 0.8), found(1, [2, 10, 10, 10], 0.9, category=2))
    assert len(boxes(other_class)) == 2
    # The suppression within the tile let both stand: agreeing with one box of the other tile does not join them.
    crowded = merge(found(0, [50, 10, 10, 10], 0.8), found(0, [52, 10, 10, 10], 0.7), found(1, [3, 10, 10, 10], 0.6))
    assert boxes(crowded) == [[50, 10, 10, 10], [52, 10, 10, 10]]


def test_tiles_without_common_area_merge_nothing() -> None:
    tiles = [PictureTile(7, tile) for tile in TileGrid(size_px=64, overlap_px=0).tiles(128, 64)]
    assert len(boxes(merge(found(0, [60, 0, 4, 9], 0.9), found(1, [0, 0, 4, 9], 0.8), tiles=tiles))) == 2


def test_the_cap_takes_the_lowest_scores_and_counts_them() -> None:
    merged = merge(*(found(0, [2 * i, 0, 2, 2], 0.1 + i / 100) for i in range(20)), max_detections=5)
    assert [round(detection["score"], 2) for detection in merged.detections] == [0.29, 0.28, 0.27, 0.26, 0.25]
    assert merged.counts["num_detections_over_cap"] == 15


def test_pictures_do_not_mix_and_one_without_detections_counts() -> None:
    tiles = [PictureTile(image_id, tile) for image_id in (7, 3, 9) for tile in GRID.tiles(112, 64)]
    merged = merge(found(0, [50, 9, 9, 9], 0.8), found(3, [2, 9, 9, 9], 0.9), tiles=tiles)
    assert [(detection["image_id"], detection["bbox"]) for detection in merged.detections] == [
        (7, [50, 9, 9, 9]),
        (3, [50, 9, 9, 9]),
    ]
    assert merged.counts["num_detected_images"] == 3
    assert merge().detections == []


@st.composite
def scenes(draw: st.DrawFn) -> tuple[TileGrid, int, int, list[list[int]]]:
    """A grid and a picture of up to 260 px with objects that do not touch, from one pixel to several tiles large."""
    grid = TileGrid(size_px=draw(st.integers(32, 90)), overlap_px=draw(st.integers(1, 16)))
    width, height = draw(st.integers(1, 260)), draw(st.integers(1, 260))
    free = np.ones((height, width), bool)
    objects: list[list[int]] = []
    for _ in range(draw(st.integers(0, 8))):
        x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        w, h = draw(st.integers(1, width - x)), draw(st.integers(1, height - y))
        if free[y : y + h, x : x + w].all():
            free[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] = False
            objects.append([x, y, w, h])
    return grid, width, height, objects


@given(scenes(), st.randoms(use_true_random=False))
def test_objects_come_back_exactly_from_their_parts_in_all_tiles(scene: Any, random: Any) -> None:
    """A detector that marks every visible part of every object, at any score: none is lost, doubled or deformed."""
    grid, width, height, objects = scene
    tiles = [PictureTile(1, tile) for tile in grid.tiles(width, height)]
    parts = []
    for number, (_, (left, top, w_tile, h_tile)) in enumerate(tiles):
        for x, y, w, h in objects:
            x1, y1 = max(x - left, 0), max(y - top, 0)
            x2, y2 = min(x + w - left, w_tile), min(y + h - top, h_tile)
            if x1 < x2 and y1 < y2:
                parts.append(found(number, [x1, y1, x2 - x1, y2 - y1], random.random()))
    merged = merge(*parts, tiles=tiles)
    assert sorted(boxes(merged)) == sorted(objects)
    assert merged.counts["num_merged_detections"] == len(parts) - len(objects)
    scores = [detection["score"] for detection in merged.detections]
    assert scores == sorted(scores, reverse=True)


@given(scenes(), st.integers(0, 60), st.randoms(use_true_random=False))
def test_nothing_disappears_uncounted(scene: Any, count: int, random: Any) -> None:
    grid, width, height, _ = scene
    tiles = [PictureTile(1, tile) for tile in grid.tiles(width, height)]
    detections = []
    for _ in range(count):
        number = random.randrange(len(tiles))
        tile = tiles[number].tile
        x, y = random.uniform(0, tile.width_px - 0.5), random.uniform(0, tile.height_px - 0.5)
        w, h = random.uniform(0.1, tile.width_px - x), random.uniform(0.1, tile.height_px - y)
        detections.append(found(number, [x, y, w, h], random.random(), random.randrange(1, 3)))
    merged = merge(*detections, tiles=tiles, max_detections=20)
    gone = merged.counts["num_merged_detections"] + merged.counts["num_detections_over_cap"]
    assert len(merged.detections) + gone == count


def write(folder: Path, sizes: list[tuple[int, int]], recorded: list[tuple[int, int]] | None = None) -> Path:
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    rows = []
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        cv2.imwrite(str(folder / f"images/{number}.png"), pixels)
        height, width = (recorded or sizes)[number]  # noqa: PLW2901
        rows.append({"id": 10 + number, "file_name": f"{number}.png", "height": height, "width": width})
    (folder / "annotations/val.json").write_text(json.dumps({"images": rows}))
    return folder


def test_samples_are_the_tiles_letterboxed(tmp_path: Path) -> None:
    folder = write(tmp_path, [(64, 112), (20, 30)])
    samples = TiledPictures(folder, "val", GRID, input_size_px=64)
    assert samples.tiles == [*(PictureTile(10, tile) for tile in GRID.tiles(112, 64)), (11, (0, 0, 30, 20))]
    pixels = cv2.imread(str(folder / "images/0.png"))
    second = samples[1]
    assert np.array_equal(second.image.permute(1, 2, 0).numpy(), pixels[:, 48:])
    assert (second.image_id, second.scale, second.original_hw, len(second.labels)) == (1, 1.0, (64, 64), 0)
    assert (samples[2].scale, samples[2].original_hw) == (64 / 30, (20, 30))
    with pytest.raises(IndexError):
        samples[3]


def test_a_picture_of_another_size_than_recorded_is_refused(tmp_path: Path) -> None:
    samples = TiledPictures(write(tmp_path, [(64, 64)], [(64, 90)]), "val", GRID, input_size_px=64)
    with pytest.raises(UndecodableImage, match="is 64x64 px, its record says 90x64"):
        samples[0]

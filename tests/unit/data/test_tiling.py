from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.card import InvalidCard, load_card
from data.prepare import prepare
from data.problems import InvalidDataset
from data.records import Box, ImageRecord, Split
from data.tile_writer import tile_split
from data.tiling import Tile, TileGrid, Tiling, tile_content, to_picture

Make = Callable[..., Path]
SIDE = st.integers(1, 300)


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    size = draw(st.integers(32, 120))
    return TileGrid(size_px=size, overlap_px=draw(st.integers(0, size // 2)))


@st.composite
def records(draw: st.DrawFn) -> ImageRecord:
    """Boxes at hundredths of a pixel, as readers leave them."""
    width, height = draw(SIDE), draw(SIDE)

    def corners(length: int) -> tuple[float, float]:
        first, second = sorted(draw(st.lists(st.integers(0, 100 * length), min_size=2, max_size=2, unique=True)))
        return first / 100, round((second - first) / 100, 2)

    def xywh() -> tuple[float, float, float, float]:
        (x, w), (y, h) = corners(width), corners(height)
        return x, y, w, h

    boxes = [xywh() for _ in range(draw(st.integers(0, 5)))]
    rows = tuple(Box(0, box, round(box[2] * box[3], 2) or 0.01, draw(st.booleans())) for box in boxes)
    return ImageRecord(1, "a.png", width, height, rows, tuple(xywh() for _ in range(draw(st.integers(0, 2)))))


def box_at(*xywh: float, crowd: bool = False) -> Box:
    return Box(0, xywh, xywh[2] * xywh[3], crowd)  # type: ignore[arg-type]


def picture(*boxes: Box, ignored: Any = (), side: int = 100) -> ImageRecord:
    return ImageRecord(1, "a.png", side, side, boxes, tuple(ignored))


@given(grids(), SIDE, SIDE)
def test_tiles_cover_every_pixel_and_stay_inside(grid: TileGrid, width: int, height: int) -> None:
    seen = np.zeros((height, width), int)
    tiles = grid.tiles(width, height)
    for x, y, w, h in tiles:
        assert (w, h) == (min(grid.size_px, width), min(grid.size_px, height))
        assert 0 <= x <= width - w and 0 <= y <= height - h  # noqa: PT018
        seen[y : y + h, x : x + w] += 1
    assert seen.min() >= 1
    assert len(set(tiles)) == len(tiles)
    columns = sorted({tile.x_px for tile in tiles})
    assert all(left + grid.size_px - right >= grid.overlap_px for left, right in pairwise(columns))
    assert tiles == tuple(sorted(tiles, key=lambda tile: (tile.y_px, tile.x_px)))


def test_the_last_tile_is_flush_and_a_small_picture_is_one_tile() -> None:
    grid = TileGrid(size_px=64, overlap_px=16)
    assert [tile.x_px for tile in grid.tiles(150, 64)] == [0, 48, 86]
    assert [tile.x_px for tile in grid.tiles(112, 64)] == [0, 48]
    assert [tile.x_px for tile in grid.tiles(65, 64)] == [0, 1]
    assert grid.tiles(64, 30) == (Tile(0, 0, 64, 30),)


@given(records(), grids())
def test_a_box_that_fits_a_tile_survives_there_and_back_exactly(record: ImageRecord, grid: TileGrid) -> None:
    for tile in grid.tiles(record.width_px, record.height_px):
        content = tile_content(record, tile, 1.0)
        returned = {tuple(round(side, 2) for side in to_picture(box.box_xywh_px, tile)) for box in content.boxes}
        for box, share in zip(record.boxes, content.visible_shares, strict=True):
            x, y, w, h = box.box_xywh_px
            fits = (
                x >= tile.x_px and y >= tile.y_px
                and round(x + w, 2) <= tile.x_px + tile.width_px and round(y + h, 2) <= tile.y_px + tile.height_px
            )  # fmt: skip
            assert (share == 1) == fits
            assert not fits or box.box_xywh_px in returned


@given(records(), grids(), st.floats(0.01, 1))
def test_visible_shares_are_those_of_a_pixel_count(record: ImageRecord, grid: TileGrid, least: float) -> None:
    """Whole-pixel boxes against a mask; each box is labelled, ignored or unseen, by its share alone."""
    whole = [box._replace(box_xywh_px=tuple(map(round, box.box_xywh_px))) for box in record.boxes]  # type: ignore[arg-type]
    assume(all(box.box_xywh_px[2] > 0 and box.box_xywh_px[3] > 0 for box in whole))
    record = record._replace(boxes=tuple(whole), ignore_xywh_px=())
    for tile in grid.tiles(record.width_px, record.height_px):
        content = tile_content(record, tile, least)
        num_labelled = num_ignored = 0
        for box, share in zip(record.boxes, content.visible_shares, strict=True):
            x, y, w, h = (int(side) for side in box.box_xywh_px)
            mask = np.zeros((y + h + tile.y_px + tile.height_px, x + w + tile.x_px + tile.width_px), bool)
            mask[y : y + h, x : x + w] = True
            seen = mask[tile.y_px : tile.y_px + tile.height_px, tile.x_px : tile.x_px + tile.width_px].sum()
            assert share == pytest.approx(seen / (w * h))
            labelled = share > 0 and (box.is_crowd or share >= least)
            num_labelled += labelled
            num_ignored += share > 0 and not labelled
        assert (len(content.boxes), len(content.ignore_xywh_px)) == (num_labelled, num_ignored)


def test_what_is_cut_too_far_is_neither_object_nor_background() -> None:
    tile = Tile(0, 0, 50, 50)
    record = picture(box_at(40, 0, 20, 10), box_at(45, 0, 20, 10), box_at(48, 0, 20, 10, crowd=True))
    content = tile_content(record._replace(ignore_xywh_px=((49.0, 49.0, 9.0, 9.0),)), tile, 0.5)
    assert [(box.box_xywh_px, box.area_px, box.is_crowd) for box in content.boxes] == [
        ((40, 0, 10, 10), 100, False),
        ((48, 0, 2, 10), 20, True),
    ]
    assert content.ignore_xywh_px == ((49, 49, 1, 1), (45, 0, 5, 10))
    assert content.visible_shares == (0.5, 0.25, 0.1)


def test_an_uncut_box_keeps_the_area_of_its_mask() -> None:
    box = Box(0, (10, 10, 20, 20), 123.4)
    (kept,) = tile_content(picture(box), Tile(5, 5, 50, 50), 0.5).boxes
    assert kept == Box(0, (5, 5, 20, 20), 123.4)


def write(folder: Path, name: str, side: int = 100, parameters: Any = ()) -> Any:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (side, side, 3), np.uint8)
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / name), pixels, parameters)
    return cv2.imread(str(folder / name))


def test_tiles_of_lossless_pictures_lose_nothing(tmp_path: Path) -> None:
    pixels = write(tmp_path, "a.bmp")
    record = picture()._replace(file_name="a.bmp")
    found, counts = tile_split(tmp_path, Split([record]), Tiling(size_px=64, overlap_px=16))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a__0_0.png", "a__0_36.png", "a__36_0.png", "a__36_36.png",
    ]  # fmt: skip
    assert [image.file_name for image in found.images] == [
        "a__0_0.png", "a__36_0.png", "a__0_36.png", "a__36_36.png",
    ]  # fmt: skip
    assert [image.image_id for image in found.images] == [1, 2, 3, 4]
    assert np.array_equal(cv2.imread(str(tmp_path / "a__36_0.png")), pixels[:64, 36:])
    assert counts == {
        "num_pictures": 1, "num_tiles": 4, "num_objects": 0, "num_whole": 0, "num_cut": 0, "num_unlabelled": 0,
    }  # fmt: skip


def test_tiles_of_jpegs_are_jpegs_and_one_tile_keeps_its_file(tmp_path: Path) -> None:
    # The bytes decide, not the name.
    smooth = np.add.outer(np.arange(100), np.arange(100)).astype(np.uint8)
    (tmp_path / "b.png").write_bytes(cv2.imencode(".jpg", smooth, (cv2.IMWRITE_JPEG_QUALITY, 100))[1].tobytes())
    write(tmp_path, "c.png", side=40)
    before = (tmp_path / "c.png").read_bytes()
    split = Split([picture()._replace(file_name="b.png"), picture(side=40)._replace(image_id=2, file_name="c.png")])
    found, counts = tile_split(tmp_path, split, Tiling(size_px=64, overlap_px=0))
    assert [image.file_name for image in found.images][:2] == ["b__0_0.jpg", "b__36_0.jpg"]
    assert found.images[-1] == ImageRecord(5, "c.png", 40, 40, (), ())
    assert (tmp_path / "c.png").read_bytes() == before
    difference = cv2.imread(str(tmp_path / "b__36_36.jpg"), 0).astype(int) - smooth[36:, 36:]
    assert np.abs(difference).max() <= 3
    assert (counts["num_pictures"], counts["num_tiles"]) == (2, 5)


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(1, 99), st.integers(1, 99)), max_size=6))
def test_every_object_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, corners: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("tiles")
    write(folder, "a.png")
    boxes = [box_at(x, y, min(w, 100 - x), min(h, 100 - y)) for x, y, w, h in corners]
    found, counts = tile_split(folder, Split([picture(*boxes)]), Tiling(size_px=64, overlap_px=16))
    assert counts["num_whole"] + counts["num_cut"] + counts["num_unlabelled"] == counts["num_objects"] == len(boxes)
    # Whole: fits one of the four windows at 0 or 36. Unlabelled: less than half of it in each of them.
    spans = [(0, 64), (36, 100)]

    def inside(start: float, length: float, span: tuple[int, int]) -> float:
        return max(min(start + length, span[1]) - max(start, span[0]), 0) / length

    best = [
        max(inside(b.box_xywh_px[0], b.box_xywh_px[2], s) for s in spans)
        * max(inside(b.box_xywh_px[1], b.box_xywh_px[3], s) for s in spans)
        for b in boxes
    ]
    assert counts["num_whole"] == sum(share == 1 for share in best)
    assert counts["num_unlabelled"] == sum(share < 0.5 - 1e-9 for share in best)
    assert sum(len(image.boxes) for image in found.images) >= counts["num_whole"] + counts["num_cut"]


def test_tiles_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "b.png", "b__0_0.png"):
        write(tmp_path, name)
    names = ["a.png", "a.bmp", "b.png"]
    split = Split([picture()._replace(file_name=name) for name in names])
    with pytest.raises(InvalidDataset) as caught:
        tile_split(tmp_path, split, Tiling(size_px=64, overlap_px=0))
    assert len(caught.value.problems) == 9
    assert "b.png: error: its tile 'b__0_0.png' has the name of another tile or picture" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "b__0_0.png"])


def test_train_is_cut_and_the_other_splits_stay_whole(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo(coco_folder(), tiling={"size_px": 32, "overlap_px": 8})
    folder = prepare("tiny", repo)
    train, val, test = (
        json.loads((folder / f"annotations/{split}.json").read_text()) for split in ("train", "val", "test")
    )
    assert len(train["images"]) == 12
    assert {(row["width"], row["height"]) for row in train["images"]} == {(32, 32)}
    assert {path.name for path in (folder / "images/train").iterdir()} == {
        Path(row["file_name"]).name for row in train["images"]
    }
    assert train["info"]["tiling"] == {
        "size_px": 32, "overlap_px": 8, "min_visible_share": 0.5,
        "num_pictures": 2, "num_tiles": 12, "num_objects": 3, "num_whole": 3, "num_cut": 0, "num_unlabelled": 0,
    }  # fmt: skip
    assert [len(document["images"]) for document in (val, test)] == [2, 2]
    assert "tiling" not in val["info"]


def test_preparing_tiles_twice_gives_the_same_bytes(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo(coco_folder(), tiling={"size_px": 32, "overlap_px": 8})

    def content() -> dict[str, bytes]:
        folder = prepare("tiny", repo)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content() == content()


@pytest.mark.parametrize(
    ("tiling", "fault"),
    [
        ({"size_px": 64, "overlap_px": 33}, "overlap_px must be at most half of size_px (64), got 33"),
        ({"size_px": 8, "overlap_px": 0}, "tiling.size_px: Input should be greater than or equal to 32, got 8"),
        ({"size_px": 64}, "tiling.overlap_px: this key is required"),
        ({"size_px": 64, "overlap": 8}, "tiling.overlap: unknown key. Did you mean 'overlap_px'? Known: size_px, over"),
        ({"size_px": 64, "overlap_px": 8, "min_visible_share": 0}, "should be greater than 0, got 0"),
    ],
)
def test_bad_tilings_are_named(coco_folder: Make, make_repo: Make, tiling: dict[str, Any], fault: str) -> None:
    repo = make_repo(coco_folder(), tiling=tiling)
    with pytest.raises(InvalidCard) as caught:
        load_card("tiny", repo / "data" / "catalog")
    assert fault in str(caught.value)


def test_a_card_without_tiling_is_written_as_before(coco_folder: Make, make_repo: Make) -> None:
    card = load_card("tiny", make_repo(coco_folder()) / "data" / "catalog")
    assert "tiling" not in card.model_dump(mode="json")
    with pytest.raises(ValidationError):
        Tiling(size_px=64, overlap_px=40)

"""`tile_split`: replace the pictures of a split by their tiles, when a dataset is prepared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2

from data.decode import read_bgr
from data.images import threads
from data.problems import InvalidDataset, Problem
from data.procedural import JPEG_PARAMETERS
from data.records import ImageRecord, Split
from data.tiling import Tile, TileContent, Tiling, tile_content

_JPEG_START = b"\xff\xd8\xff"


class TiledSplit(NamedTuple):
    """A split of tiles and what became of its pictures and objects.

    `counts`: `num_pictures`, `num_tiles`, `num_objects` (without crowd boxes), of which `num_whole` are whole in some
    tile, `num_cut` are labelled by their visible part alone, and `num_unlabelled` are ignore regions in every tile that
    shows them; the three add up.
    """

    split: Split
    counts: dict[str, int]


def tile_split(images: Path, split: Split, tiling: Tiling) -> TiledSplit:
    """Write the tiles of every picture under `images`, remove the pictures, and return the tiles as a split.

    Tiles are named `<stem>__<x>_<y>` after their corner, and numbered from 1. A tile of a JPEG picture is a JPEG of
    quality 95 without subsampling; any other is a PNG, and loses nothing. A picture that is one tile keeps its file.

    Raises:
        InvalidDataset: two tiles, or a tile and a picture, would have the same name.
    """
    jobs = [(record, tiling.tiles(record.width_px, record.height_px)) for record in split.images]
    named = [(record, tiles, _names(images, record, tiles)) for record, tiles in jobs]
    _refuse_clashes(images, [(record, name) for record, _, names in named for name in names])
    with threads() as pool:
        list(pool.map(lambda job: _write(images, *job), named))
    counts = dict.fromkeys(("num_pictures", "num_tiles", "num_objects", "num_whole", "num_cut", "num_unlabelled"), 0)
    records: list[ImageRecord] = []
    for record, tiles, names in named:
        contents = [tile_content(record, tile, tiling.min_visible_share) for tile in tiles]
        for tile, name, content in zip(tiles, names, contents, strict=True):
            size = tile.width_px, tile.height_px
            records.append(ImageRecord(len(records) + 1, name, *size, content.boxes, content.ignore_xywh_px))
        counts["num_pictures"] += 1
        counts["num_tiles"] += len(tiles)
        for best in _best_shares(record, contents):
            counts["num_objects"] += 1
            fate = "whole" if best == 1 else "cut" if best >= tiling.min_visible_share else "unlabelled"
            counts[f"num_{fate}"] += 1
    return TiledSplit(
        Split(records, split.num_boxes_clipped, split.num_boxes_excluded, split.num_images_excluded), counts
    )


def _best_shares(record: ImageRecord, contents: Sequence[TileContent]) -> Iterator[float]:
    """Of each object, not of crowd boxes, the largest share that a tile shows."""
    for row, box in enumerate(record.boxes):
        if not box.is_crowd:
            yield max(content.visible_shares[row] for content in contents)


def _names(images: Path, record: ImageRecord, tiles: Sequence[Tile]) -> list[str]:
    if len(tiles) == 1:
        return [record.file_name]
    with (images / record.file_name).open("rb") as file:
        suffix = ".jpg" if file.read(len(_JPEG_START)) == _JPEG_START else ".png"
    path = PurePosixPath(record.file_name)
    return [str(path.with_name(f"{path.stem}__{tile.x_px}_{tile.y_px}{suffix}")) for tile in tiles]


def _refuse_clashes(images: Path, named: Sequence[tuple[ImageRecord, str]]) -> None:
    times = Counter(name for _, name in named)
    problems = [
        Problem(
            images / record.file_name,
            None,
            f"its tile {name!r} has the name of another tile or picture",
            "Rename one picture",
        )
        for record, name in named
        if times[name] > 1 or (name != record.file_name and (images / name).exists())
    ]
    if problems:
        raise InvalidDataset(problems)


def _write(images: Path, record: ImageRecord, tiles: Sequence[Tile], names: Sequence[str]) -> None:
    if len(tiles) == 1:
        return
    picture = read_bgr(images / record.file_name)
    for (x, y, width, height), name in zip(tiles, names, strict=True):
        parameters = JPEG_PARAMETERS if name.endswith(".jpg") else ()
        if not cv2.imwrite(str(images / name), picture[y : y + height, x : x + width], parameters):
            raise OSError(f"could not write {images / name}: is the disk full?")
    (images / record.file_name).unlink()

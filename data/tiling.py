"""Tiles of a picture: where they lie, what of its boxes they show, and the way back.

One geometry for both uses: `data.tile_writer` cuts training pictures, `data.tiled_pictures` shows whole ones to a
detector tile by tile.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.records import XYWH, Box, ImageRecord, clip_xywh


class Tile(NamedTuple):
    """A window of a picture, in pixels of that picture."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int


class TileGrid(BaseModel):
    """Square tiles of `size_px` a side; neighbours share at least `overlap_px`.

    An object that is no larger than the overlap is whole in at least one tile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_px: int = Field(ge=32)
    overlap_px: int = Field(ge=0)

    @model_validator(mode="after")
    def _advances(self) -> Self:
        if 2 * self.overlap_px > self.size_px:
            raise ValueError(f"overlap_px must be at most half of size_px ({self.size_px}), got {self.overlap_px}")
        return self

    def tiles(self, width_px: int, height_px: int) -> tuple[Tile, ...]:
        """Tiles that cover the picture, row by row.

        The last of a row or column ends flush with the picture, and so overlaps its neighbour by more. Along a side
        that is no longer than a tile there is one tile, of that length.
        """
        width, height = min(self.size_px, width_px), min(self.size_px, height_px)
        return tuple(Tile(x, y, width, height) for y in self._starts(height_px) for x in self._starts(width_px))

    def _starts(self, length_px: int) -> list[int]:
        last = max(length_px - self.size_px, 0)
        return [*range(0, last, self.size_px - self.overlap_px), last]


class Tiling(TileGrid):
    """How a dataset's training pictures are cut.

    An object is labelled in a tile that shows at least `min_visible_share` of its box. Less of it is neither object
    nor background, and becomes an ignore region there.
    """

    min_visible_share: float = Field(0.5, gt=0, le=1)


class TileContent(NamedTuple):
    """What a tile shows of a picture's boxes and regions, in pixels of the tile.

    `visible_shares`: of each of the picture's boxes in turn, the share of its area inside the tile, 0..1.
    """

    boxes: tuple[Box, ...]
    ignore_xywh_px: tuple[XYWH, ...]
    visible_shares: tuple[float, ...]


def tile_content(record: ImageRecord, tile: Tile, min_visible_share: float) -> TileContent:
    """Clip a picture's boxes and ignore regions to a tile.

    Ignore regions and crowd boxes mark places, so any part of them stays what it is. A cut object's area is that of
    its visible part.
    """
    boxes, ignored, shares = [], [], []
    for region in record.ignore_xywh_px:
        if (part := _part(region, tile)) is not None:
            ignored.append(part)
    for box in record.boxes:
        part = _part(box.box_xywh_px, tile)
        if part is None:
            shares.append(0.0)
            continue
        area_px, whole_px = part[2] * part[3], box.box_xywh_px[2] * box.box_xywh_px[3]
        shares.append(min(area_px / whole_px, 1.0))
        if box.is_crowd or shares[-1] >= min_visible_share:
            boxes.append(box._replace(box_xywh_px=part, area_px=box.area_px if shares[-1] == 1 else round(area_px, 2)))
        else:
            ignored.append(part)
    return TileContent(tuple(boxes), tuple(ignored), tuple(shares))


def to_picture(box_xywh_px: XYWH, tile: Tile) -> XYWH:
    """Return a box of a tile in pixels of the whole picture."""
    x, y, w, h = box_xywh_px
    return x + tile.x_px, y + tile.y_px, w, h


def _part(box_xywh_px: XYWH, tile: Tile) -> XYWH | None:
    x, y, w, h = box_xywh_px
    return clip_xywh((x - tile.x_px, y - tile.y_px, w, h), tile.width_px, tile.height_px)

"""`TiledPictures`: a split of whole pictures as the tiles that a detector looks at one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from data.augment import Image, letterbox
from data.batch import Sample
from data.coco_layout import IMAGES, annotation_file
from data.decode import UndecodableImage, read_bgr
from data.tiling import Tile, TileGrid


class PictureTile(NamedTuple):
    """A tile and the picture that it is a part of."""

    image_id: int
    tile: Tile


def tile_sample(picture: Image, tile: Tile, input_size_px: int, index: int) -> Sample:
    """A tile of a BGR picture, letterboxed, as the sample `index`, without ground truth."""
    x, y, width, height = tile
    image, scale = letterbox(picture[y : y + height, x : x + width], input_size_px)
    none = torch.zeros(0, 4)
    return Sample(
        image=torch.from_numpy(image).permute(2, 0, 1),
        boxes_xyxy_px=none,
        labels=torch.zeros(0, dtype=torch.int64),
        ignore_xyxy_px=none,
        image_id=index,
        scale=scale,
        original_hw=(height, width),
    )


class TiledPictures(Dataset[Sample]):
    """One letterboxed sample per tile of every picture, in the order of the annotation file.

    A sample's `image_id` is its index into `tiles`, its `original_hw` the size of the tile: what is detected on it is
    in pixels of the tile. It carries no ground truth.
    """

    def __init__(self, root: Path, split: str, grid: TileGrid, *, input_size_px: int) -> None:
        images = json.loads(annotation_file(root, split).read_bytes())["images"]
        self.input_size_px = input_size_px
        self._paths = {image["id"]: root / IMAGES / image["file_name"] for image in images}
        self._hw = {image["id"]: (image["height"], image["width"]) for image in images}
        self.tiles = [
            PictureTile(image["id"], tile) for image in images for tile in grid.tiles(image["width"], image["height"])
        ]
        # Tiles of one picture come one after the other: it is decoded once.
        self._latest: tuple[int, Image] | None = None

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"tile index {index} must be in 0..{len(self) - 1}")
        image_id, tile = self.tiles[index]
        return tile_sample(self._picture(image_id), tile, self.input_size_px, index)

    def _picture(self, image_id: int) -> Image:
        if self._latest is None or self._latest[0] != image_id:
            picture = read_bgr(self._paths[image_id])
            if picture.shape[:2] != self._hw[image_id]:
                raise UndecodableImage(
                    f"{self._paths[image_id]}: is {picture.shape[1]}x{picture.shape[0]} px, its record says "
                    f"{self._hw[image_id][1]}x{self._hw[image_id][0]}. Prepare the dataset again"
                )
            self._latest = image_id, picture
        return self._latest[1]

"""Detections of tiles, merged into detections of whole pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from data.tiled_pictures import PictureTile
from data.tiling import Tile, to_picture
from evaluation.checks import CocoDetection
from evaluation.detector import Detected
from evaluation.tile_merging import merge_detections


def merge_tiles(detected: Detected, tiles: Sequence[PictureTile], *, max_detections: int) -> Detected:
    """Return detections in pixels of the pictures, by picture in the order of `tiles` and by descending score.

    `detected` holds what was found on the tiles: each `image_id` is an index into `tiles`. What is one object, and its
    box, says `tile_merging.merge_detections`.

    Beyond `max_detections` a picture's lowest scores are left out. `counts` gains `num_tiles`,
    `num_merged_detections` and `num_detections_over_cap`; `num_detected_images` counts pictures.
    """
    found: list[CocoDetection] = []
    num_merged = num_over_cap = 0
    by_tile: dict[int, list[CocoDetection]] = {}
    for detection in detected.detections:
        by_tile.setdefault(detection["image_id"], []).append(detection)
    pictures = [
        (image_id, list(rows)) for image_id, rows in groupby(range(len(tiles)), lambda row: tiles[row].image_id)
    ]
    for image_id, rows in pictures:
        merged, num_gone = _merge_picture(image_id, [(tiles[row].tile, by_tile.get(row, [])) for row in rows])
        found += merged[:max_detections]
        num_merged += num_gone
        num_over_cap += max(len(merged) - max_detections, 0)
    counts = {
        **detected.counts,
        "num_detected_images": len(pictures),
        "num_tiles": len(tiles),
        "num_merged_detections": num_merged,
        "num_detections_over_cap": num_over_cap,
    }
    return detected._replace(detections=found, counts=counts)


def _merge_picture(
    image_id: int, by_tile: Sequence[tuple[Tile, Sequence[CocoDetection]]]
) -> tuple[list[CocoDetection], int]:
    """A picture's detections by descending score, and how many were merged into others."""
    flat = [(number, detection) for number, (_, part) in enumerate(by_tile) for detection in part]
    boxes = np.array([to_picture(_xywh(d["bbox"]), by_tile[n][0]) for n, d in flat], np.float64).reshape(-1, 4)
    rows, boxes_xyxy_px = merge_detections(
        np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        np.array([detection["score"] for _, detection in flat], np.float64),
        np.array([detection["category_id"] for _, detection in flat], np.int64),
        np.array([number for number, _ in flat], np.int64),
        np.array([_corners(tile) for tile, _ in by_tile], np.float64),
    )
    merged: list[CocoDetection] = [
        {
            "image_id": image_id,
            "category_id": flat[row][1]["category_id"],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": flat[row][1]["score"],
        }
        for row, (x1, y1, x2, y2) in zip(rows, boxes_xyxy_px, strict=True)
    ]
    return merged, len(flat) - len(merged)


def _corners(tile: Tile) -> tuple[int, int, int, int]:
    return tile.x_px, tile.y_px, tile.x_px + tile.width_px, tile.y_px + tile.height_px


def _xywh(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, w, h = box
    return x, y, w, h

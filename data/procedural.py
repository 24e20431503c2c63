"""Render a procedural dataset: its raw data is a recipe, its pictures are JPEG at quality 95 without subsampling."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2

from data.card import DatasetCard
from data.records import SPLITS, XYWH, Box, ImageRecord, Split, clip_xywh
from data.samples import aerial, surface
from data.samples.scene import Recipe, Scene, load_recipe

JPEG_PARAMETERS = (
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
# By the recipe's `scenes`.
_RENDERERS: dict[str, Callable[[Recipe, str, int], Scene]] = {"aerial": aerial.render, "surface": surface.render}


def render_dataset(card: DatasetCard, raw: Path, images: Path) -> dict[str, Split]:
    """Write every picture of the recipe under `images` and return the records; image ids run through all splits."""
    recipe = load_recipe(raw)
    jobs = [(split, index) for split in SPLITS for index in range(recipe.num_images[split])]
    splits: dict[str, Split] = {split: Split() for split in SPLITS}
    # Spawned, not forked: the caller may hold threads. The result does not depend on the number of processes.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        records = pool.map(partial(_write, recipe, len(card.classes), images), enumerate(jobs, start=1), chunksize=8)
        for (split, _), record in zip(jobs, records, strict=True):
            splits[split].images.append(record)
    return splits


def _write(recipe: Recipe, num_classes: int, images: Path, job: tuple[int, tuple[str, int]]) -> ImageRecord:
    image_id, (split, index) = job
    scene = _RENDERERS[recipe.scenes](recipe, split, index)
    height, width = scene.image_bgr.shape[:2]
    file_name = f"{split}-{index:06d}.jpg"
    if not cv2.imwrite(str(images / file_name), scene.image_bgr, JPEG_PARAMETERS):
        raise OSError(f"could not write {images / file_name}: is the disk full?")
    labels = scene.labels.tolist()
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"{file_name}: a rendered label is outside the card's {num_classes} classes: {labels}")
    boxes = [_clip_xyxy(box, width, height) for box in scene.boxes_xyxy_px.tolist()]
    regions = [_clip_xyxy(region, width, height) for region in scene.ignore_xyxy_px.tolist()]
    rows = (Box(label, box, round(box[2] * box[3], 2)) for label, box in zip(labels, boxes, strict=True))
    return ImageRecord(image_id, file_name, width, height, tuple(rows), tuple(regions))


def _clip_xyxy(box_xyxy_px: list[float], width_px: int, height_px: int) -> XYWH:
    x1, y1, x2, y2 = box_xyxy_px
    clipped = clip_xywh((x1, y1, x2 - x1, y2 - y1), width_px, height_px)
    if clipped is None:
        raise ValueError(f"rendered box {box_xyxy_px} has no area inside its {width_px}x{height_px} px picture")
    return clipped

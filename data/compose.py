"""One training sample from several pictures: mosaic, mix-up, copy-paste, and the order in which all are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import cv2
import numpy as np

from data.augment import (
    PAD_GREY,
    AugmentConfig,
    Boxes,
    Image,
    Picture,
    areas_px,
    draw_affine,
    flip,
    pad,
    shift_colour,
    warp,
)

# COCO's limit for a small object, here in pixels of the picture at training size.
SMALL_AREA_PX = 32**2
MAX_PASTED = 10
PLACES_TRIED = 10


def compose(
    index: int,
    read: Callable[[int], Picture],
    num_images: int,
    input_size_px: int,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    joins: bool,
) -> Picture:
    """Return an augmented (S, S) picture made of `read(index)`; with `joins`, of other pictures beside it, too.

    In this order: copy-paste within each picture; a mosaic, or else an affine transform, or else padding; mix-up with
    another picture made in the same way; flip; colour.
    """

    def picture(index: int) -> Picture:
        read_picture = read(index)
        if joins and config.copy_paste_probability and rng.random() < config.copy_paste_probability:
            return copy_paste(read_picture, rng)
        return read_picture

    def base(index: int) -> Picture:
        if joins and rng.random() < config.mosaic_probability:
            others = rng.integers(num_images, size=3).tolist()
            return mosaic([picture(tile) for tile in (index, *others)], input_size_px, config, rng)
        single = picture(index)
        if config.affine_probability and rng.random() < config.affine_probability:
            height, width = single.image.shape[:2]
            return warp(single, draw_affine((height, width), input_size_px, config, rng), input_size_px)
        return replace(single, image=pad(single.image, input_size_px))

    result = base(index)
    if joins and config.mixup_probability and rng.random() < config.mixup_probability:
        result = mixup(result, base(int(rng.integers(num_images))))
    if rng.random() < config.flip_probability:
        result = flip(result)
    return replace(result, image=shift_colour(result.image, config, rng))


def mosaic(tiles: Sequence[Picture], input_size_px: int, config: AugmentConfig, rng: np.random.Generator) -> Picture:
    """Join four pictures at a random point of a (2S, 2S) canvas, then move that into the (S, S) input; see `warp`.

    The tiles (each no larger than S) touch the point (U(S/2, 3S/2), U(S/2, 3S/2)) with their inner corners; what
    sticks out of the canvas is cut off.
    """
    side = 2 * input_size_px
    canvas = np.full((side, side, 3), PAD_GREY, np.uint8)
    x_joint, y_joint = rng.integers(input_size_px // 2, 3 * input_size_px // 2 + 1, 2).tolist()
    boxes, regions = [], []
    for position, tile in enumerate(tiles):
        height, width = tile.image.shape[:2]
        left = x_joint - width if position % 2 == 0 else x_joint
        top = y_joint - height if position < 2 else y_joint
        _paste(canvas, tile.image, left, top)
        offset = np.array((left, top, left, top), np.float32)
        boxes.append(tile.boxes_xyxy_px + offset)
        regions.append(tile.ignore_xyxy_px + offset)
    labels = np.concatenate([tile.labels for tile in tiles])
    joined = Picture(canvas, np.concatenate(boxes), labels, np.concatenate(regions))
    return warp(joined, draw_affine((side, side), input_size_px, config, rng), input_size_px)


def mixup(one: Picture, other: Picture) -> Picture:
    """Return the mean of two pictures of one size, with the objects and ignore regions of both.

    Equal halves, as in YOLOX (Ge et al. 2021): a random share would hide tiny objects whose boxes stay.
    """
    return Picture(
        cv2.addWeighted(one.image, 0.5, other.image, 0.5, 0.0),
        np.concatenate((one.boxes_xyxy_px, other.boxes_xyxy_px)),
        np.concatenate((one.labels, other.labels)),
        np.concatenate((one.ignore_xyxy_px, other.ignore_xyxy_px)),
    )


def copy_paste(picture: Picture, rng: np.random.Generator) -> Picture:
    """Return the picture with up to MAX_PASTED of its small objects a second time, at random free places.

    After Kisantal et al. 2019, with boxes for masks. An object is copied with the whole pixels that its box touches,
    if they touch no other box or ignore region, and pasted where they touch none either; PLACES_TRIED places are tried.
    """
    height, width = picture.image.shape[:2]
    areas = areas_px(picture.boxes_xyxy_px)
    small = np.flatnonzero((areas > 0) & (areas <= SMALL_AREA_PX))
    image = picture.image.copy()
    taken = np.concatenate((picture.boxes_xyxy_px, picture.ignore_xyxy_px))
    boxes, labels = [picture.boxes_xyxy_px], [picture.labels]
    for index in rng.permutation(small)[:MAX_PASTED].tolist():
        box = picture.boxes_xyxy_px[index]
        x1, y1 = np.floor(box[:2]).astype(int).tolist()
        x2, y2 = np.ceil(box[2:]).astype(int).tolist()
        # Rounded at resizing, a picture may end before its boxes do.
        if x2 > width or y2 > height or _num_touched(taken, x1, y1, x2, y2) > 1:
            continue
        patch = picture.image[y1:y2, x1:x2]
        for left, top in rng.integers((width - x2 + x1 + 1, height - y2 + y1 + 1), size=(PLACES_TRIED, 2)).tolist():
            if not _num_touched(taken, left, top, left + x2 - x1, top + y2 - y1):
                _paste(image, patch, left, top)
                pasted = (box + np.array((left - x1, top - y1) * 2, np.float32))[None]
                taken = np.concatenate((taken, pasted))
                boxes.append(pasted)
                labels.append(picture.labels[index : index + 1])
                break
    return Picture(image, np.concatenate(boxes), np.concatenate(labels), picture.ignore_xyxy_px)


def _num_touched(boxes_xyxy_px: Boxes, x1: int, y1: int, x2: int, y2: int) -> int:
    """How many of the boxes (G, 4) have a point in the given one."""
    left, top, right, bottom = boxes_xyxy_px.T
    return int(((left < x2) & (right > x1) & (top < y2) & (bottom > y1)).sum())


def _paste(canvas: Image, image: Image, left: int, top: int) -> None:
    """Copy the part of the image that lies on the canvas when its corner is put at (left, top)."""
    height, width = image.shape[:2]
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    if x1 < x2 and y1 < y2:
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]

"""Transforms of one training picture and its boxes.

Legend: S input side, G ground truths, R ignore regions. Images are uint8 BGR (H, W, 3); boxes are float32 `xyxy` in
pixels of the image at hand, origin at the top left. Every random number comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
from cv2.typing import MatLike

PAD_GREY = 114
MIN_VISIBLE_SHARE = 0.2
MIN_SIDE_PX = 1.0

Image = MatLike
Boxes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of the augmentations (YOLOX's recipe without rotation, shear and mix-up, which cost tiny boxes dear).

    The gains are the largest shifts of OpenCV's 8-bit H, S and V, each applied to every other picture. `scale_min`,
    `scale_max` and `translate` (share of the input side) act on mosaics only.

    Raises:
        ValueError: a probability or `translate` is outside 0..1, a gain is negative, or the scales are out of order.
    """

    mosaic_probability: float = 1.0
    flip_probability: float = 0.5
    hue_gain: float = 5.0
    saturation_gain: float = 30.0
    value_gain: float = 30.0
    scale_min: float = 0.5
    scale_max: float = 1.5
    translate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mosaic_probability", "flip_probability", "translate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("hue_gain", "saturation_gain", "value_gain"):
            if not 0 <= getattr(self, name) <= 255:
                raise ValueError(f"{name} must be in 0..255, got {getattr(self, name)}")
        if not 0 < self.scale_min <= self.scale_max:
            raise ValueError(f"scales must be 0 < scale_min <= scale_max, got {self.scale_min} and {self.scale_max}")


@dataclass(frozen=True)
class Picture:
    """`image` (H, W, 3); `boxes_xyxy_px` (G, 4); `labels` (G,); `ignore_xyxy_px` (R, 4)."""

    image: Image
    boxes_xyxy_px: Boxes
    labels: Labels
    ignore_xyxy_px: Boxes


def fit_scale(height_px: int, width_px: int, input_size_px: int) -> float:
    """Return the factor that makes the longer side fill the input."""
    return min(input_size_px / height_px, input_size_px / width_px)


def resize_to_fit(image: Image, input_size_px: int) -> Image:
    """Resize by `fit_scale`. Shrinking averages over areas: plain bilinear sampling would skip tiny objects."""
    height, width = image.shape[:2]
    scale = fit_scale(height, width, input_size_px)
    if scale == 1.0:
        return image
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1.0 else cv2.INTER_LINEAR)


def letterbox(image: Image, input_size_px: int) -> tuple[Image, float]:
    """Return the image resized to fit, at the top left of a grey (S, S, 3) square, and its scale."""
    scale = fit_scale(image.shape[0], image.shape[1], input_size_px)
    return pad(resize_to_fit(image, input_size_px), input_size_px), scale


def pad(image: Image, input_size_px: int) -> Image:
    """Return the image at the top left of a grey square."""
    height, width = image.shape[:2]
    below, right = input_size_px - height, input_size_px - width
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(PAD_GREY,) * 3)


def flip(picture: Picture) -> Picture:
    """Mirror left and right."""
    width = picture.image.shape[1]
    return replace(
        picture,
        image=cv2.flip(picture.image, 1),
        boxes_xyxy_px=_flip_boxes(picture.boxes_xyxy_px, width),
        ignore_xyxy_px=_flip_boxes(picture.ignore_xyxy_px, width),
    )


def shift_colour(image: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Shift hue (cyclic), saturation and value (clipped), each with probability 1/2, by up to its gain."""
    gains = np.array((config.hue_gain, config.saturation_gain, config.value_gain))
    shifts = (rng.uniform(-1.0, 1.0, 3) * gains * rng.integers(0, 2, 3)).astype(np.int64)
    if not shifts.any():
        return image
    values = np.arange(256)
    table = np.stack(((values + shifts[0]) % 180, *(np.clip(values + shift, 0, 255) for shift in shifts[1:])), axis=-1)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), table.astype(np.uint8)[:, None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def mosaic(tiles: Sequence[Picture], input_size_px: int, config: AugmentConfig, rng: np.random.Generator) -> Picture:
    """Join four pictures at a random point of a (2S, 2S) canvas, then scale and shift into the (S, S) input.

    The tiles (each no larger than S) touch the point (U(S/2, 3S/2), U(S/2, 3S/2)) with their inner corners. The
    canvas' centre goes to the input's centre, scaled by U(scale_min, scale_max), shifted by up to `translate` of S.
    A box is kept when at least MIN_VISIBLE_SHARE of its area stays and both sides exceed MIN_SIDE_PX; one cut
    further is gone, as most of its object is. An ignore region stays as long as any of it does.
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
    scale = rng.uniform(config.scale_min, config.scale_max)
    shift = (0.5 - scale + rng.uniform(-config.translate, config.translate, 2)) * input_size_px
    matrix = np.array(((scale, 0.0, shift[0]), (0.0, scale, shift[1])))
    # Pixel centres are at half-integers in box coordinates, at integers in OpenCV's.
    centred = matrix.copy()
    centred[:, 2] += 0.5 * (scale - 1.0)
    image = cv2.warpAffine(canvas, centred, (input_size_px, input_size_px), borderValue=(PAD_GREY,) * 3)

    def place(canvas_boxes: Boxes) -> Boxes:
        visible = np.clip(canvas_boxes, 0, side) * scale + np.tile(shift, 2)
        return np.asarray(np.clip(visible, 0, input_size_px), np.float32)

    joined, labels = np.concatenate(boxes), np.concatenate([tile.labels for tile in tiles])
    placed, ignored = place(joined), place(np.concatenate(regions))
    keep = (areas_px(placed) >= MIN_VISIBLE_SHARE * scale**2 * areas_px(joined)) & is_large_enough(placed)
    return Picture(image, placed[keep], labels[keep], ignored[areas_px(ignored) > 0])


def is_large_enough(boxes_xyxy_px: Boxes) -> npt.NDArray[np.bool_]:
    """Whether both sides of each box exceed MIN_SIDE_PX."""
    large: npt.NDArray[np.bool_] = np.min(boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2], axis=1) > MIN_SIDE_PX
    return large


def areas_px(boxes_xyxy_px: Boxes) -> Boxes:
    """Areas (G,) of boxes (G, 4)."""
    sides = boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]
    areas: Boxes = sides[:, 0] * sides[:, 1]
    return areas


def _flip_boxes(boxes_xyxy_px: Boxes, width_px: int) -> Boxes:
    flipped = boxes_xyxy_px.copy()
    flipped[:, (0, 2)] = width_px - boxes_xyxy_px[:, (2, 0)]
    return flipped


def _paste(canvas: Image, image: Image, left: int, top: int) -> None:
    """Copy the part of the image that lies on the canvas when its corner is put at (left, top)."""
    height, width = image.shape[:2]
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    if x1 < x2 and y1 < y2:
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]

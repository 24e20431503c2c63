"""Transforms of one training picture and its boxes; `data.compose` joins several.

Legend: S input side, G ground truths, R ignore regions. Images are uint8 BGR (H, W, 3); boxes are float32 `xyxy` in
pixels of the image at hand, origin at the top left. Every random number comes from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np
import numpy.typing as npt
from cv2.typing import MatLike
from pydantic import Field

PAD_GREY = 114
MIN_VISIBLE_SHARE = 0.2
MIN_SIDE_PX = 1.0

Image = MatLike
Boxes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


# Left out of JSON where it is off: the keys of runs without it stay what they were before it was there.
_OffByDefault = Annotated[float, Field(exclude_if=lambda strength: strength == 0)]


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of the augmentations. The defaults are YOLOX's recipe without rotation, shear and mix-up, which cost
    tiny boxes dear.

    The gains are the largest shifts of OpenCV's 8-bit H, S and V, each applied to every other picture. `scale_min`,
    `scale_max`, `translate` (share of the input side), `rotation_degrees` and `shear_degrees` (largest angles, either
    way) act on mosaics, and on the share `affine_probability` of the other pictures. See `data.compose` for mix-up and
    copy-paste.

    Raises:
        ValueError: a probability or `translate` is outside 0..1, a gain outside 0..255, an angle outside 0..180
            (rotation) or 0..40 (shear), or the scales are out of order.
    """

    mosaic_probability: float = 1.0
    flip_probability: float = 0.5
    hue_gain: float = 5.0
    saturation_gain: float = 30.0
    value_gain: float = 30.0
    scale_min: float = 0.5
    scale_max: float = 1.5
    translate: float = 0.1
    affine_probability: _OffByDefault = 0.0
    rotation_degrees: _OffByDefault = 0.0
    shear_degrees: _OffByDefault = 0.0
    mixup_probability: _OffByDefault = 0.0
    copy_paste_probability: _OffByDefault = 0.0

    def __post_init__(self) -> None:
        limits = {"translate": 1, "rotation_degrees": 180, "shear_degrees": 40}
        limits |= {f"{name}_probability": 1 for name in ("mosaic", "flip", "affine", "mixup", "copy_paste")}
        limits |= {f"{name}_gain": 255 for name in ("hue", "saturation", "value")}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be in 0..{limit}, got {getattr(self, name)}")
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


def fit_hw(height_px: int, width_px: int, input_size_px: int) -> tuple[int, int]:
    """Return height and width after `resize_to_fit`."""
    scale = fit_scale(height_px, width_px, input_size_px)
    return max(round(height_px * scale), 1), max(round(width_px * scale), 1)


def resize_to_fit(image: Image, input_size_px: int) -> Image:
    """Resize by `fit_scale`. Shrinking averages over areas: plain bilinear sampling would skip tiny objects."""
    height, width = image.shape[:2]
    scale = fit_scale(height, width, input_size_px)
    if scale == 1.0:
        return image
    size = fit_hw(height, width, input_size_px)[::-1]
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


def draw_affine(
    source_hw: tuple[int, int], input_size_px: int, config: AugmentConfig, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return a random matrix (2, 3) from points of a source (H, W) to points of the (S, S) input, in pixels.

    The source's centre goes to the input's centre, shifted by up to `translate` of S a side; around it the source is
    sheared along both axes, turned and scaled.
    """
    scale = rng.uniform(config.scale_min, config.scale_max)
    shift = (0.5 + rng.uniform(-config.translate, config.translate, 2)) * input_size_px
    linear = np.diag((scale, scale))
    # Drawn only where they are used: recipes from before they existed keep their random numbers.
    if config.rotation_degrees:
        angle = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees))
        linear = linear @ np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
    if config.shear_degrees:
        across, down = np.tan(np.deg2rad(rng.uniform(-config.shear_degrees, config.shear_degrees, 2)))
        linear = linear @ np.array(((1.0, across), (down, 1.0)))
    centre = np.array(source_hw[::-1]) / 2
    return np.column_stack((linear, shift - linear @ centre))


def warp(picture: Picture, matrix: npt.NDArray[np.float64], input_size_px: int) -> Picture:
    """Return the picture moved by a matrix (2, 3) into the (S, S) input, grey where it does not reach.

    A box becomes the upright box around its four moved corners: tight for scales and shifts, up to twice the object's
    area when turned. It is kept when at least MIN_VISIBLE_SHARE of that area lies within the picture and the input,
    and both sides exceed MIN_SIDE_PX; one cut further is gone, as most of its object is. An ignore region stays as
    long as any of it does.
    """
    linear, shift = matrix[:, :2], matrix[:, 2]
    # Pixel centres are at half-integers in box coordinates, at integers in OpenCV's.
    centred = np.column_stack((linear, shift + 0.5 * (linear.sum(axis=1) - 1.0)))
    image = cv2.warpAffine(picture.image, centred, (input_size_px, input_size_px), borderValue=(PAD_GREY,) * 3)
    far_corner = np.tile(np.array(picture.image.shape[1::-1], np.float32), 2)

    def place(boxes_xyxy_px: Boxes) -> Boxes:
        within = np.clip(boxes_xyxy_px, 0, far_corner)
        return np.asarray(np.clip(_moved(within, linear, shift), 0, input_size_px), np.float32)

    placed, ignored = place(picture.boxes_xyxy_px), place(picture.ignore_xyxy_px)
    whole = areas_px(_moved(picture.boxes_xyxy_px, linear, shift))
    keep = (areas_px(placed) >= MIN_VISIBLE_SHARE * whole) & is_large_enough(placed)
    return Picture(image, placed[keep], picture.labels[keep], ignored[areas_px(ignored) > 0])


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


def _moved(boxes_xyxy_px: Boxes, linear: npt.NDArray[np.float64], shift: npt.NDArray[np.float64]) -> Boxes:
    """Upright boxes (G, 4) around the moved corners of boxes (G, 4)."""
    # In float32, as boxes are: matches of objects to anchors can turn on the last bit, and with them loss curves.
    corners = boxes_xyxy_px[:, ((0, 1), (2, 1), (0, 3), (2, 3))] @ linear.T.astype(np.float32) + shift
    moved: Boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
    return moved

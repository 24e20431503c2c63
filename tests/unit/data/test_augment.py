from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import (
    MIN_VISIBLE_SHARE,
    PAD_GREY,
    AugmentConfig,
    Boxes,
    Picture,
    fit_scale,
    flip,
    letterbox,
    shift_colour,
)
from data.compose import mosaic

S = 64
SEEDS = st.integers(0, 2**31)
SIDES = st.integers(1, 3 * S)
few = settings(max_examples=60, deadline=None)


def _picture(seed: int, height: int = S, width: int = S, num_boxes: int = 5) -> Picture:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (num_boxes, 2, 2)) * (width, height)
    boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1).astype(np.float32)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Picture(image, boxes, rng.integers(0, 3, num_boxes), boxes[:2])


def _inside(boxes_xyxy_px: Boxes) -> bool:
    ordered = (boxes_xyxy_px[:, :2] <= boxes_xyxy_px[:, 2:]).all()
    return bool(ordered and (boxes_xyxy_px >= 0).all() and (boxes_xyxy_px <= S).all())


@few
@given(SEEDS, SIDES, SIDES)
def test_flip_twice_is_the_identity_and_boxes_stay_inside(seed: int, height: int, width: int) -> None:
    picture = _picture(seed, height, width)
    once = flip(picture)
    assert (once.boxes_xyxy_px[:, :2] <= once.boxes_xyxy_px[:, 2:]).all()
    assert (once.boxes_xyxy_px >= 0).all()
    assert (once.boxes_xyxy_px <= (width, height, width, height)).all()
    twice = flip(once)
    np.testing.assert_array_equal(twice.image, picture.image)
    np.testing.assert_allclose(twice.boxes_xyxy_px, picture.boxes_xyxy_px, atol=1e-4)
    np.testing.assert_allclose(twice.ignore_xyxy_px, picture.ignore_xyxy_px, atol=1e-4)


@few
@given(SEEDS, SIDES, SIDES)
def test_letterbox_fits_and_its_scale_maps_back(seed: int, height: int, width: int) -> None:
    image, scale = letterbox(np.full((height, width, 3), 255, np.uint8), S)
    assert image.shape == (S, S, 3)
    filled = (image == 255).all(axis=2)
    # The picture fills one side and starts at the top left; the rest is grey.
    assert filled.sum() == filled.any(axis=1).sum() * filled.any(axis=0).sum()
    assert filled[0, 0]
    assert max(filled.any(axis=1).sum(), filled.any(axis=0).sum()) == S
    assert (image[~filled] == PAD_GREY).all()
    boxes = _picture(seed, height, width).boxes_xyxy_px
    assert _inside(np.round(boxes * scale, 3))
    np.testing.assert_allclose(boxes * scale / scale, boxes, rtol=1e-5)


def test_letterbox_moves_pixels_with_their_boxes() -> None:
    """A white block in a picture of twice the size covers half its box after shrinking."""
    image = np.zeros((2 * S, 2 * S, 3), np.uint8)
    image[20:60, 40:100] = 255
    small, scale = letterbox(image, S)
    assert scale == fit_scale(2 * S, 2 * S, S) == 0.5
    rows, columns = np.nonzero(small[..., 0])
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (20, 10, 50, 30)


@few
@given(SEEDS, st.integers(1, S), st.integers(1, S))
def test_mosaic_boxes_stay_inside_and_labels_follow(seed: int, height: int, width: int) -> None:
    tiles = [_picture(seed + offset, height, width, num_boxes=offset) for offset in range(4)]
    for tile in tiles:
        tile.labels[:] = np.arange(len(tile.labels))
    joined = mosaic(tiles, S, AugmentConfig(), np.random.default_rng(seed))
    assert joined.image.shape == (S, S, 3)
    assert _inside(joined.boxes_xyxy_px)
    assert _inside(joined.ignore_xyxy_px)
    assert len(joined.labels) == len(joined.boxes_xyxy_px)
    assert joined.boxes_xyxy_px.dtype == joined.ignore_xyxy_px.dtype == np.float32


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(4, 40), st.integers(4, 40))
def test_mosaic_boxes_lie_on_their_pixels(seed: int, height: int, width: int) -> None:
    """One blue block in black tiles: where it shows, the box is its extent; where too little shows, there is none."""
    rng = np.random.default_rng(seed)
    left, top = int(rng.integers(0, S - width + 1)), int(rng.integers(0, S - height + 1))
    black = Picture(
        np.zeros((S, S, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
    )
    image = black.image.copy()
    image[top : top + height, left : left + width, 0] = 255
    box = np.array([[left, top, left + width, top + height]], np.float32)
    tiles = [black] * 4
    tiles[int(rng.integers(4))] = Picture(image, box, np.array([2]), box)
    scale = float(rng.uniform(0.5, 1.5))
    joined = mosaic(tiles, S, AugmentConfig(scale_min=scale, scale_max=scale), rng)

    blue = joined.image[..., 0].astype(int) - joined.image[..., 1] > 100
    visible_share = blue.sum() / (height * width * scale**2)
    if len(joined.boxes_xyxy_px):
        assert joined.labels.tolist() == [2]
        rows, columns = np.nonzero(blue)
        extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(joined.boxes_xyxy_px[0], extent, atol=1.01)
        np.testing.assert_array_equal(joined.boxes_xyxy_px, joined.ignore_xyxy_px)
    perimeter_share = 2 * (height + width) * scale / (height * width * scale**2)
    if visible_share > MIN_VISIBLE_SHARE + perimeter_share:
        assert len(joined.boxes_xyxy_px) == 1
    if visible_share < MIN_VISIBLE_SHARE - perimeter_share:
        assert len(joined.boxes_xyxy_px) == 0
    assert len(joined.ignore_xyxy_px) == 1 or not blue.any()


def test_colour_shift_matches_a_loop_over_pixels() -> None:
    """Value up and saturation down on one colour, against the standard library's conversion."""
    config = AugmentConfig(hue_gain=0, saturation_gain=30, value_gain=30)
    bgr = (60, 90, 150)
    image = np.full((2, 2, 3), bgr, np.uint8)
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in bgr[::-1]))
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        shifts = (rng.uniform(-1, 1, 3) * (0, 30, 30) * rng.integers(0, 2, 3)).astype(int)
        expected = colorsys.hsv_to_rgb(hue, saturation + shifts[1] / 255, value + shifts[2] / 255)
        found = shift_colour(image, config, np.random.default_rng(seed))
        np.testing.assert_allclose(found[0, 0], np.array(expected)[::-1] * 255, atol=3)
        seen.add(tuple(np.sign(shifts)))
    for channel in (1, 2):
        assert {signs[channel] for signs in seen} == {-1, 0, 1}


@pytest.mark.parametrize("value", [0, 255])
def test_value_saturates_instead_of_wrapping(value: int) -> None:
    config = AugmentConfig(hue_gain=0, saturation_gain=0, value_gain=30)
    image = np.full((1, 1, 3), value, np.uint8)
    for seed in range(20):
        shifted = int(shift_colour(image, config, np.random.default_rng(seed))[0, 0, 0])
        assert abs(shifted - value) <= 30


def test_no_gain_changes_nothing() -> None:
    picture = _picture(0)
    config = replace(AugmentConfig(), hue_gain=0, saturation_gain=0, value_gain=0)
    assert shift_colour(picture.image, config, np.random.default_rng(0)) is picture.image

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.augment import (
    MIN_VISIBLE_SHARE,
    PAD_GREY,
    AugmentConfig,
    Boxes,
    Image,
    Picture,
    areas_px,
    draw_affine,
    fit_scale,
    flip,
    is_large_enough,
    letterbox,
    shift_colour,
    warp,
)

S = 64
SEEDS = st.integers(0, 2**31)
SIDES = st.integers(1, 3 * S)
few = settings(max_examples=60)


def _picture(seed: int, height: int = S, width: int = S, num_boxes: int = 5) -> Picture:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (num_boxes, 2, 2)) * (width, height)
    boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1).astype(np.float32)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Picture(image, boxes, rng.integers(0, 3, num_boxes), boxes[:2])


def _painted(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A black picture with one blue block as object and as ignore region."""
    left, top = int(rng.integers(0, S - width + 1)), int(rng.integers(0, S - height + 1))
    image = np.zeros((S, S, 3), np.uint8)
    image[top : top + height, left : left + width, 0] = 255
    box = np.array([[left, top, left + width, top + height]], np.float32)
    return Picture(image, box, np.array([2]), box)


def _is_blue(image: Image) -> npt.NDArray[np.bool_]:
    blue: npt.NDArray[np.bool_] = image[..., 0].astype(int) - image[..., 1] > 100
    return blue


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


def _random_config(rng: np.random.Generator, **fixed: float) -> AugmentConfig:
    values = {
        "rotation_degrees": rng.uniform(0, 180),
        "shear_degrees": rng.uniform(0, 40),
        "translate": rng.uniform(0, 0.5),
    }
    return AugmentConfig(scale_min=0.5, scale_max=2.0, **values | fixed)


@few
@given(SEEDS, SIDES, SIDES)
def test_warped_boxes_stay_inside_with_their_labels(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    picture = _picture(seed, height, width)
    picture.labels[:] = np.arange(5)
    matrix = draw_affine((height, width), S, _random_config(rng), rng)
    warped = warp(picture, matrix, S)
    assert warped.image.shape == (S, S, 3)
    assert _inside(warped.boxes_xyxy_px)
    assert _inside(warped.ignore_xyxy_px)
    assert warped.boxes_xyxy_px.dtype == warped.ignore_xyxy_px.dtype == np.float32
    assert (areas_px(warped.ignore_xyxy_px) > 0).all()
    # A corner that stays inside goes into the box of the same label.
    for box, label in zip(warped.boxes_xyxy_px, warped.labels, strict=True):
        corners = [(x, y, 1) for x in picture.boxes_xyxy_px[label, ::2] for y in picture.boxes_xyxy_px[label, 1::2]]
        moved = np.array([matrix @ corner for corner in corners])
        inside = (np.clip(moved, 0, S) == moved).all(axis=1, keepdims=True)
        assert (box[:2] <= np.where(inside, moved, np.inf).min(axis=0) + 1e-3).all()
        assert (box[2:] >= np.where(inside, moved, -np.inf).max(axis=0) - 1e-3).all()


@settings(max_examples=150)
@given(SEEDS, st.integers(6, 40), st.integers(6, 40))
def test_warped_boxes_lie_on_their_pixels(seed: int, height: int, width: int) -> None:
    """A painted block, found again: inside its box and its ignore region, and touching all their sides if uncut."""
    rng = np.random.default_rng(seed)
    picture = _painted(rng, height, width)
    warped = warp(picture, draw_affine((S, S), S, _random_config(rng), rng), S)
    rows, columns = np.nonzero(_is_blue(warped.image))
    if not len(rows):
        assert len(warped.boxes_xyxy_px) == 0 or areas_px(warped.boxes_xyxy_px)[0] < 60
        return
    extent = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    for box in (*warped.boxes_xyxy_px, *warped.ignore_xyxy_px):
        assert (box[:2] <= extent[:2] + 1).all()
        assert (box[2:] >= extent[2:] - 1).all()
        if (box[:2] > 2).all() and (box[2:] < S - 2).all():
            # The tip of a turned corner is less than half a pixel of blue.
            np.testing.assert_allclose(box, extent, atol=3)
    assert len(warped.ignore_xyxy_px) == 1


@few
@given(SEEDS, st.floats(0.3, 3.0))
def test_a_box_is_kept_by_its_visible_share(seed: int, scale: float) -> None:
    """Against a loop over boxes, some of which stick out of their picture, for a scale and a shift."""
    rng = np.random.default_rng(seed)
    picture = _picture(seed, num_boxes=12)
    picture.boxes_xyxy_px[:] += np.tile(rng.uniform(-S / 2, S / 2, (12, 2)), 2)
    dx, dy = rng.uniform(-S, S, 2)
    expected = []
    for (x1, y1, x2, y2), label in zip(picture.boxes_xyxy_px.tolist(), picture.labels.tolist(), strict=True):
        left, top, right, bottom = x1 * scale + dx, y1 * scale + dy, x2 * scale + dx, y2 * scale + dy
        seen = [max(left, 0, dx), max(top, 0, dy), min(right, S, dx + S * scale), min(bottom, S, dy + S * scale)]
        share = max(seen[2] - seen[0], 0) * max(seen[3] - seen[1], 0) / ((right - left) * (bottom - top))
        margin = min(abs(share - MIN_VISIBLE_SHARE), abs(seen[2] - seen[0] - 1), abs(seen[3] - seen[1] - 1))
        assume(margin > 1e-4)
        if share >= MIN_VISIBLE_SHARE and min(seen[2] - seen[0], seen[3] - seen[1]) > 1:
            expected.append((*seen, label))
    warped = warp(picture, np.array(((scale, 0, dx), (0, scale, dy))), S)
    found = np.column_stack((warped.boxes_xyxy_px, warped.labels))
    np.testing.assert_allclose(found, np.array(expected).reshape(-1, 5), atol=1e-3)


@few
@given(SEEDS, SIDES, SIDES)
def test_an_affine_matrix_keeps_what_it_promises(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    config = _random_config(rng)
    matrix = draw_affine((height, width), S, config, rng)
    centre = matrix @ (width / 2, height / 2, 1)
    assert (abs(centre - S / 2) <= config.translate * S + 1e-6).all()
    # Turning keeps areas, shearing by two angles changes them by 1 - tan tan.
    shearing = np.tan(np.deg2rad(config.shear_degrees)) ** 2
    area = np.linalg.det(matrix[:, :2])
    assert 0.5**2 * (1 - shearing) - 1e-9 <= area <= 2.0**2 * (1 + shearing) + 1e-9
    turned = draw_affine((height, width), S, replace(config, shear_degrees=0.0), rng)[:, :2]
    scale = np.sqrt(np.linalg.det(turned))
    np.testing.assert_allclose(turned @ turned.T, np.eye(2) * scale**2, atol=1e-9)
    assert abs(np.rad2deg(np.arctan2(turned[1, 0], turned[0, 0]))) <= config.rotation_degrees + 1e-6


def test_a_quarter_turn_moves_pixels_exactly() -> None:
    picture = _picture(3)
    quarter = np.array(((0.0, -1.0, S), (1.0, 0.0, 0.0)))
    turned = warp(picture, quarter, S)
    np.testing.assert_array_equal(turned.image, np.rot90(picture.image, -1))
    x1, y1, x2, y2 = picture.boxes_xyxy_px.T
    expected = np.stack((S - y2, x1, S - y1, x2), axis=1)
    np.testing.assert_allclose(turned.boxes_xyxy_px, expected[is_large_enough(expected)], atol=1e-4)


def test_angles_that_are_off_take_no_random_numbers() -> None:
    """A recipe from before they existed gives the samples that it gave."""
    one, two = np.random.default_rng(1), np.random.default_rng(1)
    matrix = draw_affine((2 * S, 2 * S), S, AugmentConfig(), one)
    scale, shift = two.uniform(0.5, 1.5), two.uniform(-0.1, 0.1, 2)
    np.testing.assert_allclose(matrix, np.column_stack((np.eye(2) * scale, (0.5 - scale + shift) * S)))
    assert one.random() == two.random()


@pytest.mark.parametrize(
    ("name", "value"),
    [("mosaic_probability", 1.1), ("copy_paste_probability", -0.1), ("mixup_probability", 2), ("affine_probability", 2),
     ("rotation_degrees", 181), ("shear_degrees", 41), ("hue_gain", 256), ("translate", float("nan"))],
)  # fmt: skip
def test_impossible_strengths_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in 0\.\.\d+, got {value}"):
        AugmentConfig(**{name: value})


def test_scales_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 < scale_min <= scale_max, got 1\.0 and 0\.5"):
        AugmentConfig(scale_min=1.0, scale_max=0.5)


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

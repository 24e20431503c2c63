from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import MIN_VISIBLE_SHARE, AugmentConfig, Boxes, Picture, areas_px, pad
from data.compose import MAX_PASTED, SMALL_AREA_PX, compose, copy_paste, mixup, mosaic

S = 64
SEEDS = st.integers(0, 2**31)
few = settings(max_examples=60)
NOTHING = AugmentConfig(mosaic_probability=0, flip_probability=0, hue_gain=0, saturation_gain=0, value_gain=0)


def _picture(seed: int, height: int = S, width: int = S, num_boxes: int = 5, largest: float = 1.0) -> Picture:
    """Noise; boxes of up to `largest` of its sides; an ignore region where there are boxes."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(0, largest, (num_boxes, 2)) * (width, height)
    corners = rng.uniform(0, 1, (num_boxes, 2)) * ((width, height) - sides)
    boxes = np.concatenate((corners, corners + sides), axis=1).astype(np.float32)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Picture(image, boxes, np.arange(num_boxes), boxes[:1] / 2)


def _inside(boxes_xyxy_px: Boxes) -> bool:
    ordered = (boxes_xyxy_px[:, :2] <= boxes_xyxy_px[:, 2:]).all()
    return bool(ordered and (boxes_xyxy_px >= 0).all() and (boxes_xyxy_px <= S).all())


def _whole_pixels(box_xyxy_px: npt.NDArray[np.float32]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = box_xyxy_px
    return int(np.floor(x1)), int(np.floor(y1)), int(np.ceil(x2)), int(np.ceil(y2))


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


@settings(max_examples=150)
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


@few
@given(SEEDS, st.integers(0, 6), st.integers(0, 6))
def test_mixup_is_the_mean_with_the_objects_of_both(seed: int, num_boxes: int, num_others: int) -> None:
    one, other = _picture(seed, num_boxes=num_boxes), _picture(seed + 1, num_boxes=num_others)
    mixed = mixup(one, other)
    mean = (one.image.astype(float) + other.image) / 2
    assert abs(mixed.image - mean).max() <= 0.5
    for name in ("boxes_xyxy_px", "labels", "ignore_xyxy_px"):
        both = [*getattr(one, name).tolist(), *getattr(other, name).tolist()]
        assert getattr(mixed, name).tolist() == both


@few
@given(SEEDS, st.integers(1, S), st.integers(1, S), st.integers(0, 25), st.floats(0.05, 1.0))
def test_pasted_objects_are_copies_in_free_places(
    seed: int, height: int, width: int, num_boxes: int, largest: float
) -> None:
    picture = _picture(seed, height, width, num_boxes, largest)
    before = picture.image.copy()
    pasted = copy_paste(picture, np.random.default_rng(seed))
    np.testing.assert_array_equal(picture.image, before)
    np.testing.assert_array_equal(pasted.boxes_xyxy_px[:num_boxes], picture.boxes_xyxy_px)
    np.testing.assert_array_equal(pasted.labels[:num_boxes], picture.labels)
    np.testing.assert_array_equal(pasted.ignore_xyxy_px, picture.ignore_xyxy_px)
    new = range(num_boxes, len(pasted.labels))
    assert len(new) <= MAX_PASTED
    assert len(set(pasted.labels[num_boxes:].tolist())) == len(new)
    untouched = np.ones((height, width), np.bool_)
    for index in new:
        source = int(pasted.labels[index])
        assert areas_px(picture.boxes_xyxy_px[source : source + 1])[0] <= SMALL_AREA_PX
        x1, y1, x2, y2 = _whole_pixels(pasted.boxes_xyxy_px[index])
        left, top, right, bottom = _whole_pixels(picture.boxes_xyxy_px[source])
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        np.testing.assert_array_equal(pasted.image[y1:y2, x1:x2], picture.image[top:bottom, left:right])
        np.testing.assert_allclose(
            pasted.boxes_xyxy_px[index] - (x1, y1, x1, y1),
            picture.boxes_xyxy_px[source] - (left, top, left, top),
            atol=1e-4,
        )
        untouched[y1:y2, x1:x2] = False
        # Neither the copy nor what it was copied from shows a part of another object.
        others = np.delete(pasted.boxes_xyxy_px, index, axis=0)
        assert not any(_overlap((x1, y1, x2, y2), box) for box in (*others, *picture.ignore_xyxy_px))
        others = np.delete(picture.boxes_xyxy_px, source, axis=0)
        assert not any(_overlap((left, top, right, bottom), box) for box in (*others, *picture.ignore_xyxy_px))
    np.testing.assert_array_equal(pasted.image[untouched], before[untouched])


def _overlap(one: tuple[int, int, int, int], other: npt.NDArray[np.float32]) -> bool:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return bool(width > 0 and height > 0)


def test_small_objects_are_pasted_and_large_ones_are_not() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    image[10:20, 10:20], image[100:140, 100:140] = 200, 90
    boxes = np.array(((10, 10, 20, 20), (100, 100, 140, 140)), np.float32)
    picture = Picture(image, boxes, np.array((3, 7)), np.zeros((0, 4), np.float32))
    pasted = copy_paste(picture, np.random.default_rng(0))
    assert pasted.labels.tolist() == [3, 7, 3]
    assert int((pasted.image == 200).sum()) == 2 * 300
    assert int((pasted.image == 90).sum()) == 3 * 40 * 40


@pytest.mark.parametrize("joins", [True, False])
def test_with_everything_off_the_padded_picture_is_left(joins: bool) -> None:
    picture = _picture(0, 40, 50)
    rng = np.random.default_rng(0)
    result = compose(
        0, lambda _: picture, 1, S, replace(NOTHING, mosaic_probability=float(not joins)), rng, joins=joins
    )
    np.testing.assert_array_equal(result.image, pad(picture.image, S))
    np.testing.assert_array_equal(result.boxes_xyxy_px, picture.boxes_xyxy_px)
    np.testing.assert_array_equal(result.ignore_xyxy_px, picture.ignore_xyxy_px)


@pytest.mark.parametrize(
    ("changes", "num_read"),
    [
        ({}, {1}),
        ({"mosaic_probability": 1}, {4}),
        ({"mixup_probability": 1}, {2}),
        ({"mosaic_probability": 1, "mixup_probability": 1}, {8}),
        ({"mosaic_probability": 0.5, "mixup_probability": 0.5}, {1, 2, 4, 5, 8}),
        ({"copy_paste_probability": 1, "affine_probability": 1}, {1}),
    ],
)
def test_how_many_pictures_go_into_one(changes: dict[str, float], num_read: set[int]) -> None:
    """The first is the one asked for; when pictures are not to be joined, it is the only one."""
    pictures, seen = [_picture(n, 40, 30) for n in range(6)], set()
    for seed in range(40):
        for joins in (True, False):
            read: list[int] = []

            def picture(index: int, read: list[int] = read) -> Picture:
                read.append(index)
                return pictures[index]

            compose(3, picture, 6, S, replace(NOTHING, **changes), np.random.default_rng(seed), joins=joins)
            assert read[0] == 3
            if joins:
                seen.add(len(read))
            else:
                assert read == [3]
    assert seen == num_read


@settings(max_examples=80)
@given(SEEDS, st.booleans())
def test_any_mixture_keeps_boxes_inside_and_repeats_itself(seed: int, joins: bool) -> None:
    rng = np.random.default_rng(seed)
    pictures = [_picture(seed + n, *rng.integers(1, S + 1, 2).tolist()) for n in range(5)]
    shares = ("mosaic", "affine", "mixup", "copy_paste", "flip")
    config = AugmentConfig(
        **{f"{name}_probability": rng.uniform() for name in shares},  # type: ignore[arg-type]
        rotation_degrees=rng.uniform(0, 180), shear_degrees=rng.uniform(0, 40),
    )  # fmt: skip
    one, two = (
        compose(2, pictures.__getitem__, 5, S, config, np.random.default_rng(seed), joins=joins) for _ in range(2)
    )
    assert one.image.shape == (S, S, 3)
    assert _inside(one.boxes_xyxy_px)
    assert _inside(one.ignore_xyxy_px)
    assert len(one.labels) == len(one.boxes_xyxy_px)
    assert one.boxes_xyxy_px.dtype == one.ignore_xyxy_px.dtype == np.float32
    for name in ("image", "boxes_xyxy_px", "labels", "ignore_xyxy_px"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))

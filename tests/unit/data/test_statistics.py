from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.records import Box, ImageRecord
from data.statistics import SIDE_EDGES_PX, split_statistics, union_area_px

INFO = {"num_boxes_clipped": 4, "num_boxes_excluded": 3}
regions = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12)), max_size=7
)


def image(*boxes: Box, ignored: Any = (), number: int = 1, size: tuple[int, int] = (100, 50)) -> ImageRecord:
    return ImageRecord(number, f"{number}.png", *size, boxes, tuple(ignored))


def square(side: float, label: int = 0, x: float = 0, y: float = 0, crowd: bool = False) -> Box:
    return Box(label, (x, y, side, side), side**2, crowd)


@given(regions)
def test_the_area_of_a_union_is_that_of_a_mask(boxes: list[Any]) -> None:
    mask = np.zeros((40, 40), bool)
    for x, y, w, h in boxes:
        mask[y : y + h, x : x + w] = True
    assert union_area_px(boxes) == mask.sum()


def test_sizes_fall_into_the_published_buckets() -> None:
    """AI-TOD: very tiny 2 to 8 px, tiny to 16, small to 32, medium to 64; COCO: small below 32, medium below 96."""
    sides = [1.9, 2, 7.9, 8, 15.9, 16, 31.9, 32, 63.9, 64, 95.9, 96, 400]
    found = split_statistics([image(*map(square, sides))], ("a",), INFO)
    assert found.objects_by_aitod_size == {
        "below 2": 1, "very tiny": 2, "tiny": 2, "small": 2, "medium": 2, "large": 4,
    }  # fmt: skip
    assert found.objects_by_coco_size == {"small": 7, "medium": 4, "large": 2}
    limits = (0, *SIDE_EDGES_PX, 1e9)
    assert found.sides == [sum(low <= side < high for side in sides) for low, high in pairwise(limits)]
    assert {2, 8, 16, 32, 64} < set(SIDE_EDGES_PX)


def test_objects_are_counted_and_crowds_are_ignored_area() -> None:
    records = [
        image(square(4), square(4, 1), square(10, 1, crowd=True), ignored=[(5.0, 5.0, 10.0, 10.0)]),
        image(square(4), number=2),
        image(number=3, size=(20, 20)),
    ]
    found = split_statistics(records, ("a", "b", "c"), INFO | {"tiling": {"size_px": 64}})
    assert (found.num_images, found.num_images_without_objects, found.num_objects) == (3, 1, 3)
    assert found.objects_per_class == {"a": 2, "b": 1, "c": 0}
    assert found.images_per_class == {"a": 2, "b": 1, "c": 0}
    assert (found.num_crowd_boxes, found.num_ignore_regions, found.num_images_with_ignored) == (1, 1, 1)
    # 10x10 each, 5x5 of them common, of 2 x 5,000 + 400 px.
    assert found.ignored_area_share == pytest.approx(175 / 10_400, abs=1e-6)
    assert found.image_sizes == {"100x50": 2, "20x20": 1}
    assert (found.num_boxes_clipped, found.num_boxes_excluded, found.tiling) == (4, 3, {"size_px": 64})
    assert found.images_by_objects == {0: 1, 1: 1, 2: 1}


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_objects_per_image_are_counts_that_occur(counts: list[int]) -> None:
    """p: the smallest count that at least a share p of the images does not exceed."""
    records = [image(*[square(4)] * count, number=number) for number, count in enumerate(counts)]
    found = split_statistics(records, ("a",), INFO).objects_per_image

    def percentile(share: float) -> int:
        return min(c for c in counts if sum(other <= c for other in counts) >= share * len(counts) - 1e-9)

    assert found == {"p50": percentile(0.5), "p99": percentile(0.99), "max": max(counts)}


def test_centres_are_relative_to_each_image() -> None:
    records = [image(square(10, x=90, y=40)), image(square(10, x=190, y=90), number=2, size=(200, 100))]
    cells = np.array(split_statistics(records, ("a",), INFO).centres)
    assert cells[14, 15] == 1  # (95, 45) of 100 x 50
    assert cells[15, 15] == 1  # (195, 95) of 200 x 100
    assert cells.sum() == 2


def test_a_split_without_objects() -> None:
    found = split_statistics([image()], ("a",), INFO)
    assert found.objects_per_image == {"p50": 0, "p99": 0, "max": 0}
    assert sum(found.sides) == sum(map(sum, found.centres)) == 0

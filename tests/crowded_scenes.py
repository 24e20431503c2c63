"""Scenes in which everything overlaps: objects of all classes, crowds, ignore regions, tied scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

Box = list[float]
Scene = tuple[dict[str, Any], list[dict[str, Any]]]


def make_scene(
    objects: list[tuple[int, int, Box, bool]],
    found: list[tuple[int, int, Box, float]],
    *,
    num_images: int,
    num_classes: int,
) -> Scene:
    """Rows are image, class, box, and crowd or score; the first image has an ignore region."""
    truth = {
        "images": [{"id": image} for image in range(1, num_images + 1)],
        "categories": [{"id": label, "name": f"class-{label}"} for label in range(1, num_classes + 1)],
        "annotations": [
            {"image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": int(is_crowd)}
            for image, label, box, is_crowd in objects
        ],
    }
    truth["images"][0]["ignore_regions_xywh"] = [[0, 0, 20, 30]]
    return truth, [
        {"image_id": image, "category_id": label, "bbox": box, "score": score} for image, label, box, score in found
    ]


def random_scene(seed: int) -> Scene:
    """Crowded images with all types of error, ties, crowds; image 7 is empty, 8 has only detections, 9 only a crowd.

    Class 4 has no objects.
    """
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(1, 7):
        for _ in range(int(rng.integers(1, 14))):
            box = [*rng.integers(0, 60, 2), *np.exp(rng.uniform(1, 4.4, 2)).round()]
            objects.append((image, int(rng.integers(1, 4)), [float(v) for v in box], bool(rng.uniform() < 0.15)))
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.normal(0, 0.2, 4) * np.tile(box[2:], 2)
                moved = np.maximum(np.add(box, shift).round(), [-50, -50, 1, 1])
                label = objects[-1][1] if rng.uniform() < 0.7 else int(rng.integers(1, 5))
                found.append((image, label, moved.tolist(), round(rng.uniform(), 1)))
    for image in (*range(1, 7), 8, 9):
        for _ in range(int(rng.integers(0, 8))):
            box = [*rng.integers(0, 300, 2), *rng.integers(1, 40, 2)]
            found.append((image, int(rng.integers(1, 5)), [float(v) for v in box], round(rng.uniform(), 2)))
    objects.append((9, 1, [0.0, 0.0, 150.0, 150.0], True))
    return make_scene(objects, [found[row] for row in rng.permutation(len(found))], num_images=9, num_classes=4)


def scenes() -> st.SearchStrategy[Scene]:
    """Small scenes in which much overlaps; also without objects, without detections, with one class."""
    place, side = st.integers(0, 24), st.integers(1, 16)
    box = st.tuples(place, place, side, side).map(lambda values: [float(value) for value in values])

    def of_size(num_images: int, num_classes: int) -> st.SearchStrategy[Scene]:
        image, label = st.integers(1, num_images), st.integers(1, num_classes)
        is_crowd = st.sampled_from([False, False, False, True])
        return st.builds(
            make_scene,
            st.lists(st.tuples(image, label, box, is_crowd), max_size=8),
            st.lists(st.tuples(image, label, box, st.integers(0, 10).map(lambda tenth: tenth / 10)), max_size=10),
            num_images=st.just(num_images),
            num_classes=st.just(num_classes),
        )

    return st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(lambda size: of_size(*size))

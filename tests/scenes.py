"""Ground truth and detections in COCO form for the tests of evaluation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import strategies as st

Box = list[float]
Scene = tuple[dict[str, Any], list[dict[str, Any]]]


def ground_truth(
    *objects: tuple[int, int, list[float]], num_images: int = 1, num_classes: int = 1, **image: Any
) -> dict[str, Any]:
    """One annotation per (image_id, category_id, bbox)."""
    return {
        "images": [{"id": i, "width": 1000, "height": 1000, **image} for i in range(1, num_images + 1)],
        "categories": [{"id": c, "name": f"class-{c}"} for c in range(1, num_classes + 1)],
        "annotations": [
            {"id": i, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[2] * bbox[3],
             "iscrowd": 0}
            for i, (image_id, category_id, bbox) in enumerate(objects, start=1)
        ],
    }  # fmt: skip


def detection(image_id: int, category_id: int, bbox: list[float], confidence: float = 0.9) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": confidence}


def random_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of all sizes with crowds, tied scores, images without objects or detections, more than 100 detections."""
    rng = np.random.default_rng(seed)
    objects, crowds, found = [], [], []
    for image_id in range(1, 9):
        for _ in range(0 if image_id == 3 else int(rng.integers(0, 12))):
            category_id = int(rng.integers(1, 4))
            bbox = [*rng.uniform(0, 700, 2), *np.exp(rng.uniform(np.log(4), np.log(250), 2))]
            objects.append((image_id, category_id, bbox))
            crowds.append(int(rng.uniform() < 0.15))
            if rng.uniform() < 0.8:
                shifted = [value + rng.normal(0, 0.06) * bbox[2 + i % 2] for i, value in enumerate(bbox)]
                found.append(detection(image_id, category_id, shifted, round(rng.uniform(), 1)))
        for _ in range(int(rng.integers(0, 6)) + 130 * (image_id == 1)):
            bbox = [*rng.uniform(0, 700, 2), *rng.uniform(4, 120, 2)]
            found.append(detection(image_id, 1 + int(image_id != 1) * int(rng.integers(0, 3)), bbox, rng.uniform()))
    truth = ground_truth(*objects, num_images=8, num_classes=4)
    for annotation, crowd in zip(truth["annotations"], crowds, strict=True):
        annotation["iscrowd"] = crowd
    found = [d for d in found if d["image_id"] != 5]
    return json.loads(json.dumps([truth, found]))


def crowded_set(
    num_images: int, num_objects: int, num_detections: int, num_classes: int = 10, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """As uneven as drone pictures: a few images and classes hold most objects, most of them small.

    Somewhat less than half of the detections lie near an object, most of these have its class.
    """
    rng = np.random.default_rng(seed)
    image = rng.choice(num_images, num_objects, p=rng.dirichlet(np.full(num_images, 1.2)))
    label = rng.choice(num_classes, num_objects, p=rng.dirichlet(np.full(num_classes, 0.8)))
    boxes = _boxes(rng, num_objects)
    source = rng.integers(0, num_objects, int(num_detections * 0.45))
    near = boxes[source] + rng.normal(0, 0.13, (len(source), 4)) * np.tile(boxes[source, 2:], 2)
    near[:, 2:] = near[:, 2:].clip(2)
    elsewhere = image[rng.integers(0, num_objects, num_detections - len(source))]
    guessed = rng.integers(0, num_classes, num_detections)
    right = np.append(rng.uniform(size=len(source)) < 0.9, np.zeros(len(elsewhere), bool))
    labels = np.where(right, np.append(label[source], elsewhere), guessed)
    scores = np.append(rng.beta(3, 2, len(source)), rng.beta(1.2, 5, len(elsewhere))).round(4)
    found = np.concatenate([near, _boxes(rng, len(elsewhere))]).round(2)
    truth = ground_truth(
        *zip((image + 1).tolist(), (label + 1).tolist(), boxes.round(2).tolist(), strict=True),
        num_images=num_images,
        num_classes=num_classes,
        width=1400,
        height=788,
    )
    columns = (np.append(image[source], elsewhere) + 1, labels + 1, found, scores)
    return truth, [detection(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _boxes(rng: np.random.Generator, count: int) -> Any:
    sides = np.exp(rng.normal(3.3, 0.7, (count, 2))).clip(3, 300).round(2)
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * ([1400, 788] - sides), sides], axis=1)


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

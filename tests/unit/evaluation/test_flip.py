"""Looking at the mirror image as well, with detectors whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.loader import DetectionDataset, collate
from evaluation.detector import detect
from models.interface import Detections, PostprocessConfig

CPU = torch.device("cpu")
SIDE_PX = 64
# Height and width; the second is taller than wide, the third as large as the input.
SHAPES = [(40, 64), (64, 30), (64, 64), (90, 31)]
SQUARES_XYWH_PX = [(5, 8, 10, 12), (2, 20, 9, 9), (50, 3, 8, 8), (10, 60, 12, 12)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark pictures with one bright square each."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    images = []
    for number, ((height, width), (x, y, w, h)) in enumerate(zip(SHAPES, SQUARES_XYWH_PX, strict=True), start=1):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[y : y + h, x : x + w] = 255
        cv2.imwrite(str(folder / "images" / f"{number}.png"), picture)
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width,
                       "ignore_regions_xywh": []})  # fmt: skip
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    (folder / "annotations" / "test.json").write_text(json.dumps(document))
    return folder


class Looks(nn.Module):
    """Finds the bright pixels' bounding box in what it is shown, which it keeps; `answer` makes detections of it."""

    num_classes = 2
    strides = (8,)

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.shown = answer, []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images.clone())
        return images

    def postprocess(self, predictions: Tensor, config: PostprocessConfig) -> list[Detections]:
        del config
        return [self.answer(image, len(self.shown)) for image in predictions]


def bright_box(image: Tensor) -> list[float]:
    rows, columns = (image[0] > 180).nonzero().unbind(1)
    return [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    boxes, scores, labels = zip(*rows, strict=True)
    return Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), num_dropped_candidates=1)


def run(dataset: Path, answer: Any, **config: Any) -> tuple[Any, Looks]:
    detector: Any = Looks(answer)
    samples = DetectionDataset(dataset, "test", input_size_px=SIDE_PX, augment=None, seed=0)
    loader: Any = DataLoader(samples, batch_size=4, collate_fn=collate)
    return detect(detector, loader, PostprocessConfig(**config), device=CPU, bf16=False, flip=True), detector


def test_the_picture_is_mirrored_and_its_padding_stays(dataset: Path) -> None:
    _, detector = run(dataset, lambda image, _: detections((bright_box(image), 0.5, 0)))
    plain, mirrored = (shown.numpy() for shown in detector.shown)
    for one, other, (height, width) in zip(plain, mirrored, SHAPES, strict=True):
        scale = SIDE_PX / max(height, width)
        h, w = round(height * scale), round(width * scale)
        np.testing.assert_array_equal(other[:, :h, :w], one[:, :h, :w][:, :, ::-1])
        np.testing.assert_array_equal(other[:, h:], one[:, h:])
        np.testing.assert_array_equal(other[:, :, w:], one[:, :, w:])
        assert (one[:, :, w:] == 114).all()


def test_what_is_found_in_both_is_one_detection_in_its_place(dataset: Path) -> None:
    """The better of two equals is kept, of whichever picture it is: here that of the mirror image."""
    (found, counts, _), _ = run(dataset, lambda image, look: detections((bright_box(image), 0.5 + 0.1 * look, 1)))
    assert [row["image_id"] for row in found] == [1, 2, 3, 4]
    for row, square, (height, width) in zip(found, SQUARES_XYWH_PX, SHAPES, strict=True):
        # A resized edge is anywhere in a pixel of the input.
        assert row["bbox"] == pytest.approx(square, abs=0.01 if max(height, width) == SIDE_PX else 1.5)
        assert (row["category_id"], row["score"]) == (2, pytest.approx(0.7))
    assert counts["num_dropped_candidates"] == 2 * len(SHAPES)
    assert counts["num_detected_images"] == len(SHAPES)


def test_what_only_the_mirror_image_shows_is_mirrored_back_and_classes_stay_apart(dataset: Path) -> None:
    def answer(image: Tensor, look: int) -> Detections:
        x1, y1, x2, y2 = bright_box(image)
        return detections(([x1, y1, x2, y2], 0.5, look - 1), ([x1, y1 + 200, x2, y2 + 200], 0.4, look - 1))

    (found, counts, _), _ = run(dataset, answer)
    assert [(row["image_id"], row["category_id"]) for row in found] == [(n, c) for n in (1, 2, 3, 4) for c in (1, 2)]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["bbox"] == pytest.approx(second["bbox"], abs=1e-4)
    # Two boxes of each picture lie below it.
    assert counts["num_degenerate_boxes"] == 2 * len(SHAPES)


def test_both_together_keep_to_the_cap_by_score(dataset: Path) -> None:
    def answer(image: Tensor, look: int) -> Detections:
        rows = [([4.0 * n, 0.0, 4.0 * n + 3, 3.0], 0.9 - 0.1 * n - 0.05 * (look - 1), look - 1) for n in range(4)]
        return detections(*rows)

    (found, *_), _ = run(dataset, answer, max_detections=5)
    of_first = [row for row in found if row["image_id"] == 1]
    assert [row["score"] for row in of_first] == pytest.approx([0.9, 0.85, 0.8, 0.75, 0.7])
    assert [row["category_id"] for row in of_first] == [1, 2, 1, 2, 1]

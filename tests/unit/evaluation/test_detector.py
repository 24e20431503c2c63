"""From network frame to original pixels, with detectors whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.loader import Batch, DetectionDataset, collate
from evaluation.coco import score
from evaluation.detector import detect
from models.interface import Detections, PostprocessConfig

CPU = torch.device("cpu")
CONFIG = PostprocessConfig()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Recorder(nn.Module):
    """Returns prepared detections per batch, and records how it was called."""

    num_classes = 3
    strides = (8,)

    def __init__(self, answers: list[list[Detections]]) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.answers = iter(answers)
        self.calls: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, images: Tensor) -> Tensor:
        product = torch.ones(1, 1) @ torch.ones(1, 1)
        self.calls.append((self.training, torch.is_inference_mode_enabled(), product.dtype))
        return images

    def postprocess(self, predictions: Tensor, config: PostprocessConfig) -> list[Detections]:
        assert config is CONFIG
        assert predictions.dtype == torch.uint8
        return next(self.answers)


def answer(*boxes_xyxy_px: list[float], num_dropped: int = 0) -> Detections:
    boxes = torch.tensor(boxes_xyxy_px, dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0.9, 0.5, len(boxes))
    return Detections(boxes, scores, torch.arange(len(boxes)) % 3, num_dropped)


def batch(image_ids: tuple[int, ...], scales: list[float], original_hw: tuple[tuple[int, int], ...]) -> Batch:
    empty, index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return Batch(
        images=torch.zeros(len(image_ids), 3, 64, 64, dtype=torch.uint8), boxes_xyxy_px=empty, labels=index,
        image_index=index, ignore_xyxy_px=empty, ignore_image_index=index, image_ids=image_ids,
        scales=torch.tensor(scales), original_hw=original_hw,
    )  # fmt: skip


def run(detector: Any, batches: list[Batch], *, bf16: bool = False) -> Any:
    return detect(detector, batches, CONFIG, device=CPU, bf16=bf16)


def test_boxes_come_back_in_original_pixels() -> None:
    batches = [batch((7, 3), [0.5, 2.0], ((100, 128), (20, 32))), batch((11,), [1.0], ((64, 64),))]
    answers = [[answer([10, 20, 30, 25], [0, 0, 64, 50]), answer([4, 8, 12, 10])], [answer()]]
    found, counts, _ = run(Recorder(answers), batches)
    assert found == [
        {"image_id": 7, "category_id": 1, "bbox": [20, 40, 40, 10], "score": pytest.approx(0.9)},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 128, 100], "score": pytest.approx(0.5)},
        {"image_id": 3, "category_id": 1, "bbox": [2, 4, 4, 1], "score": pytest.approx(0.9)},
    ]
    assert counts == {
        "num_detected_images": 3, "num_dropped_candidates": 0, "num_degenerate_boxes": 0, "num_non_finite_boxes": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_boxes_are_clipped_and_what_is_left_out_is_counted() -> None:
    nan, inf = float("nan"), float("inf")
    boxes = answer(
        [-10, -10, 8, 8],  # clipped at the origin
        [30, 10, 90, 70],  # clipped at the far corner: the image is 40 x 20, the rest of the input is padding
        [41, 5, 60, 15],  # in the padding
        [5, 5, 5, 9],  # no width
        [9, 5, 7, 9],  # corners swapped
        [nan, 0, 5, 5],
        [0, 0, inf, 5],
        num_dropped=4,
    )
    found, counts, _ = run(Recorder([[boxes]]), [batch((1,), [1.0], ((20, 40),))])
    assert [entry["bbox"] for entry in found] == [[0, 0, 8, 8], [30, 10, 10, 10]]
    assert counts == {
        "num_detected_images": 1, "num_dropped_candidates": 4, "num_degenerate_boxes": 3, "num_non_finite_boxes": 2,
    }  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_runs_in_inference_and_evaluation_mode_and_restores(training: bool, bf16: bool) -> None:
    detector = Recorder([[answer()]]).train(training)
    detector.frozen.eval()
    run(detector, [batch((1,), [1.0], ((64, 64),))], bf16=bf16)
    assert detector.calls == [(False, True, torch.bfloat16 if bf16 else torch.float32)]
    assert detector.training is training
    assert detector.frozen.training is False


def test_modes_are_restored_after_a_failure() -> None:
    detector = Recorder([]).train()
    with pytest.raises(StopIteration):
        run(detector, [batch((1,), [1.0], ((64, 64),))])
    assert detector.training


def test_an_image_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        run(Recorder([[answer()]]), [batch((1, 2), [1.0, 1.0], ((64, 64), (64, 64)))])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of five pictures of different shapes, each with a grey level of its own."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (height, width) in enumerate([(60, 100), (100, 60), (64, 64), (33, 47), (128, 50)], start=1):
        pixels = np.full((height, width, 3), 20 * i, dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), pixels)
        images.append({"id": 10 * i, "file_name": f"{i}.png", "height": height, "width": width,
                       "ignore_regions_xywh": []})  # fmt: skip
        for _ in range(4):
            x, y = rng.uniform(0, width - 14), rng.uniform(0, height - 14)
            w, h = rng.uniform(5, 13, 2)
            annotations.append({"id": len(annotations) + 1, "image_id": 10 * i, "iscrowd": 0, "area": w * h,
                                "category_id": int(rng.integers(1, 3)), "bbox": [x, y, w, h]})  # fmt: skip
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "boat"}]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "test.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return folder


@dataclass(frozen=True)
class _Truth:
    boxes_xyxy_px: Tensor
    labels: Tensor


class Clairvoyant(nn.Module):
    """Knows the loader's own ground truth, and tells the pictures apart by their grey level."""

    def __init__(self, samples: DetectionDataset) -> None:
        super().__init__()
        each = [samples[i] for i in range(len(samples))]
        self.truth = {int(s.image[0, 0, 0]): _Truth(s.boxes_xyxy_px, s.labels) for s in each}

    def forward(self, images: Tensor) -> list[_Truth]:
        return [self.truth[int(image[0, 0, 0])] for image in images]

    def postprocess(self, predictions: list[_Truth], config: PostprocessConfig) -> list[Detections]:
        assert config is CONFIG
        return [Detections(t.boxes_xyxy_px, torch.ones(len(t.labels)), t.labels) for t in predictions]


@pytest.mark.parametrize("input_size_px", [64, 160])
def test_perfect_detections_in_the_network_frame_score_one(dataset: Path, input_size_px: int) -> None:
    samples = DetectionDataset(dataset, "test", input_size_px=input_size_px, augment=None, seed=0)
    loader: Any = DataLoader(samples, batch_size=2, collate_fn=collate)
    detector: Any = Clairvoyant(samples)
    found, counts, _ = detect(detector, loader, CONFIG, device=CPU, bf16=False)
    truth = json.loads((dataset / "annotations" / "test.json").read_text())
    assert counts["num_detected_images"] == 5
    assert score(truth, found, ignore_rule="none").metrics["coco/AP"] == pytest.approx(1.0)

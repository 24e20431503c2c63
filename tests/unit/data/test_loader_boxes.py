"""What becomes of boxes and regions between the annotation file and the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import models
from data.loader import AugmentConfig, DetectionDataset, collate
from training.loop import to_device


def _write(folder: Path, side_px: int, boxes_xywh_px: list[list[float]], **changes: Any) -> Path:
    """A split of one square, noisy image with these objects; `changes` to the image's and last object's record."""
    (folder / "annotations").mkdir()
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / "images/a.png"), rng.integers(0, 256, (side_px, side_px, 3), np.uint8))
    regions = changes.pop("ignore_regions_xywh", [])
    image = {"id": 1, "file_name": "a.png", "width": side_px, "height": side_px, "ignore_regions_xywh": regions}
    annotations: list[dict[str, Any]] = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, box in enumerate(boxes_xywh_px, start=1)
    ]
    annotations[-1] |= changes
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (folder / "annotations/train.json").write_text(json.dumps(content))
    return folder


def test_nine_hundred_boxes_in_one_image_all_arrive(tmp_path: Path) -> None:
    """Of the image itself, and of the four of a mosaic that shows most of them."""
    boxes = [[20.0 * (n % 30) + 2, 20.0 * (n // 30) + 2, 15.0, 15.0] for n in range(900)]
    folder = _write(tmp_path, 600, boxes)
    plain = DetectionDataset(folder, "train", input_size_px=600, augment=None, seed=0)[0]
    assert len(plain.boxes_xyxy_px) == len(plain.labels) == 900
    assert collate([plain, plain]).image_index.tolist() == [0] * 900 + [1] * 900
    whole = AugmentConfig(scale_min=0.33, scale_max=0.33, translate=0)
    mosaics = DetectionDataset(folder, "train", input_size_px=600, augment=whole, seed=5)
    counts = []
    for epoch in range(5):
        mosaics.set_epoch(epoch, joins=True)
        counts.append(len(mosaics[0].labels))
    assert max(counts) > 2500


@pytest.mark.parametrize("name", ["yolox-nano", "yolov8-n"])
def test_anchors_in_ignore_regions_and_crowds_get_no_gradient_from_a_sample(tmp_path: Path, name: str) -> None:
    """From the file's region and crowd box through the loader and the loss to the logits of every anchor point."""
    folder = _write(
        tmp_path, 128, [[4, 100, 12, 12], [80, 10, 40, 30]], iscrowd=1, ignore_regions_xywh=[[4, 4, 40, 28]]
    )
    dataset = DetectionDataset(folder, "train", input_size_px=64, augment=None, seed=0)
    images, targets = to_device(collate([dataset[0]]), torch.device("cpu"))
    assert images.dtype == torch.uint8
    torch.manual_seed(0)
    detector: Any = models.build(name, num_classes=1)
    predictions = detector(images)
    logits = getattr(predictions, "objectness_logits", predictions.class_logits)
    logits.retain_grad()
    losses = detector.criterion(predictions, targets)
    sum(losses.sums.values()).backward()
    learns = logits.grad[0].reshape(logits.shape[1], -1).abs().sum(dim=1) > 0
    x, y = predictions.anchors_xy_px.T
    # At half size.
    ignored = ((x > 2) & (x < 22) & (y > 2) & (y < 16)) | ((x > 40) & (x < 60) & (y > 5) & (y < 20))
    assert ignored.sum() > 5
    assert not learns[ignored].any()
    assert learns[~ignored].all()

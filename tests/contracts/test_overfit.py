"""Each family learns eight pictures of tiny objects by heart: what cannot be learned here is broken, not slow."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch
from families import NUM_IMAGES, SMALLEST, scene, total_loss
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import models
from models.interface import Detections, PostprocessConfig, Targets

MAX_STEPS = 900
LEARNING_RATE = 2e-3


def coco_ap(targets: Targets, detections: list[Detections]) -> float:
    def entry(image: int, box: torch.Tensor, label: int) -> dict[str, Any]:
        x1, y1, x2, y2 = box.tolist()
        bbox = [x1, y1, x2 - x1, y2 - y1]
        return {"image_id": image + 1, "category_id": label + 1, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}

    rows = zip(targets.image_index.tolist(), targets.boxes_xyxy_px, targets.labels.tolist(), strict=True)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image + 1} for image in range(NUM_IMAGES)],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [entry(*row) | {"id": index + 1} for index, row in enumerate(rows)],
    }
    found = [
        entry(image, box, int(label)) | {"score": float(score)}
        for image, one in enumerate(detections)
        for box, score, label in zip(one.boxes_xyxy_px, one.scores, one.labels, strict=True)
    ]
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SMALLEST)
def test_eight_images_of_tiny_objects_are_learned_by_heart(name: str) -> None:
    images, targets = scene()
    torch.manual_seed(0)
    detector: Any = models.build(name, num_classes=2, **SMALLEST[name])
    detector.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0)
    reached = 0.0
    for step in range(MAX_STEPS):
        for group in optimizer.param_groups:
            share = min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / MAX_STEPS))
            group["lr"] = LEARNING_RATE * share
        optimizer.zero_grad()
        total_loss(detector.train(), images, targets).backward()
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                reached = max(
                    reached, coco_ap(targets, detector.eval().postprocess(detector(images), PostprocessConfig()))
                )
            if reached > 0.9:
                break
    assert reached > 0.9

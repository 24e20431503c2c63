"""Each family learns eight pictures of tiny objects by heart: what cannot be learned here is broken, not slow."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch
from families import SMALLEST
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import models
from models.interface import Detections, PostprocessConfig, Targets

NUM_IMAGES = 8
SIDE_PX = 128
NUM_OBJECTS = 6
MAX_STEPS = 900
LEARNING_RATE = 2e-3
COLOURS = torch.tensor([[40.0, 180.0, 220.0], [200.0, 60.0, 60.0]])


def scene() -> tuple[torch.Tensor, Targets]:
    """Grey noise with rectangles of 6 to 12 px in two colours, two pixels or more apart."""
    generator = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    images = torch.randint(90, 110, (NUM_IMAGES, 3, SIDE_PX, SIDE_PX), generator=generator).float()
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for image in range(NUM_IMAGES):
        placed: list[tuple[int, int, int, int]] = []
        while len(placed) < NUM_OBJECTS:
            width, height = integer(6, 13), integer(6, 13)
            x, y = integer(0, SIDE_PX - width), integer(0, SIDE_PX - height)
            near = (x - 2, y - 2, x + width + 2, y + height + 2)
            if any(near[0] < b[2] and b[0] < near[2] and near[1] < b[3] and b[1] < near[3] for b in placed):
                continue
            placed.append((x, y, x + width, y + height))
            labels.append(integer(0, 2))
            images[image, :, y : y + height, x : x + width] = COLOURS[labels[-1]].view(3, 1, 1)
        boxes += placed
    return images, Targets(
        torch.tensor(boxes).float(),
        torch.tensor(labels),
        torch.arange(NUM_IMAGES).repeat_interleave(NUM_OBJECTS),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )


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
        losses = detector.train().criterion(detector(images), targets)
        optimizer.zero_grad()
        torch.stack([value / losses.counts[term].clamp(min=1) for term, value in losses.sums.items()]).sum().backward()
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                reached = max(
                    reached, coco_ap(targets, detector.eval().postprocess(detector(images), PostprocessConfig()))
                )
            if reached > 0.9:
                break
    assert reached > 0.9

"""The same detector on a GPU: equal predictions, and a training step in bf16. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SMALLEST, tensors

import models
from models.interface import PostprocessConfig, Targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def targets(device: str) -> Targets:
    boxes = torch.tensor([[8.0, 8.0, 20.0, 18.0], [40.0, 40.0, 52.0, 60.0], [10.0, 30.0, 16.0, 38.0]], device=device)
    index = torch.tensor([0, 0, 1], device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Targets(boxes, torch.tensor([0, 1, 2], device=device), index, torch.zeros(0, 4, device=device), none)


def built(name: str) -> Any:
    torch.manual_seed(0)
    return models.build(name, num_classes=3, **SMALLEST[name])


@pytest.mark.parametrize("name", SMALLEST)
def test_predictions_and_losses_agree_with_the_cpu(name: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    detector = built(name).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    on_cpu = detector(images)
    losses_on_cpu = detector.criterion(on_cpu, targets("cpu"))
    detector.cuda()
    on_gpu = detector(images.cuda())
    for key, value in tensors(on_cpu).items():
        torch.testing.assert_close(tensors(on_gpu)[key].cpu(), value, rtol=1e-3, atol=1e-3)
    losses_on_gpu = detector.criterion(on_gpu, targets("cuda"))
    for term, value in losses_on_cpu.sums.items():
        torch.testing.assert_close(losses_on_gpu.sums[term].cpu(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_bf16_step_reaches_every_parameter(name: str) -> None:
    detector = built(name)
    detector.cuda().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        predictions = detector(images)
    losses = detector.criterion(predictions, targets("cuda"), closing=True)
    sum(losses.sums.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    detections = detector.postprocess(predictions, PostprocessConfig())
    assert len(detections) == 2

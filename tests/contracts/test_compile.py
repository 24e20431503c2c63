"""`torch.compile` and `torch.export` over the whole table: same numbers, no graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tensors
from torch import nn

import models

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


class Raw(nn.Module):
    """A detector whose predictions are a plain tuple, which is all that an exported program can return."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensors(self.detector(images)).values())


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_an_exported_program_gives_the_same_predictions(name: str) -> None:
    torch.manual_seed(0)
    model = Raw(models.build(name, num_classes=3)).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64)).float()
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        for got, expected in zip(program.module()(images), model(images), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_compiled_detector_is_one_graph_with_the_same_predictions(name: str) -> None:
    """Without code generation, which takes minutes an architecture on a CPU: what breaks a graph breaks it here."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Raw(models.build(name, num_classes=3)).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64)).float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for got, expected in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

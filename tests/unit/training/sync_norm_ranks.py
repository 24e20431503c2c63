"""Batch normalisation on one rank of a group, see `gloo.on_all_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.sync_batch_norm import convert

CPU = torch.device("cpu")


class Case(NamedTuple):
    """What is normalised: so many images on each rank, of so many channels, around an offset of each rank's own."""

    images: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels: int = 5
    size: tuple[int, int] = (6, 7)
    offset: float = 1.0
    memory_format: torch.memory_format = torch.channels_last
    needs_input_gradient: bool = True
    momentum: float | None = 0.03
    affine: bool = True


CASES = {
    "even": Case((3, 3)),
    "float64": Case((3, 2), torch.float64),
    "uneven": Case((1, 4)),
    "three ranks, batch of 8": Case((2, 3, 3)),
    "contiguous": Case((2, 3), memory_format=torch.contiguous_format),
    "one channel": Case((2, 2), channels=1),
    "one pixel": Case((2, 1), size=(1, 1)),
    "large mean": Case((2, 3), offset=1000.0),
    "bfloat16": Case((2, 3), torch.bfloat16, channels=40),
    "bfloat16, large mean": Case((3, 3), torch.bfloat16, offset=100.0),
    "bfloat16, contiguous": Case((2, 2), torch.bfloat16, memory_format=torch.contiguous_format),
    "input without gradient": Case((2, 3), needs_input_gradient=False),
    "cumulative average": Case((2, 3), momentum=None),
    "without weight and bias": Case((2, 3), affine=False),
}


def whole_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output over all ranks, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    shape = (sum(case.images), case.channels, *case.size)
    x, dy = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    rank = torch.arange(len(case.images)).repeat_interleave(torch.tensor(case.images))
    x = x * torch.linspace(0.5, 3, case.channels).view(-1, 1, 1) + case.offset * (1 + rank.view(-1, 1, 1, 1) / 8)
    return tuple(part.to(case.dtype).contiguous(memory_format=case.memory_format) for part in (x, dy + 0.3))


def module(case: Case) -> nn.BatchNorm2d:
    """Plain batch normalisation whose weights, biases and running statistics differ between channels."""
    norm = nn.BatchNorm2d(case.channels, eps=1e-3, momentum=case.momentum, affine=case.affine)
    factors = {"weight": 1.0, "bias": -2.0, "running_mean": 3.0, "running_var": 0.7}
    for name, tensor in norm.state_dict().items():
        if name in factors:
            tensor.copy_(factors[name] * torch.linspace(0.5, 1.5, case.channels))
    return norm.double() if case.dtype == torch.float64 else norm


def run(folder: Path) -> dict[str, Any]:
    """Every case with as many ranks as this group has."""
    size, rank = dist.get_world_size(), dist.get_rank()
    seen: dict[str, Any] = {name: normalised(case, rank) for name, case in CASES.items() if len(case.images) == size}
    if rank == 0:
        # Alone: a rank that waited for another would wait in vain.
        seen["frozen"] = frozen()
    seen["empty"] = refusal_of_nothing()
    return seen


def normalised(case: Case, rank: int) -> dict[str, Any]:
    """Two steps of this rank's part of the batch, and what the second gave."""
    norm = convert(module(case), CPU)
    x, dy = (part.split(case.images)[rank] for part in whole_batch(case))
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(case.needs_input_gradient)
    for _ in range(2):
        norm.zero_grad()
        x.grad = None
        y = norm(x)
        # As the gradient of a sum over images comes: not in the memory order of the output.
        y.backward(dy.contiguous())
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": buffers}


def frozen() -> dict[str, Tensor]:
    """Output and running mean in eval mode."""
    case = CASES["even"]
    norm = convert(module(case), CPU).eval()
    return {"y": norm(whole_batch(case)[0]).detach(), "running_mean": norm.running_mean.clone()}


def refusal_of_nothing() -> str:
    """What is said to a rank without an image."""
    try:
        convert(nn.BatchNorm2d(3), CPU)(torch.zeros(0, 3, 4, 4))
    except ValueError as error:
        return str(error)
    return ""

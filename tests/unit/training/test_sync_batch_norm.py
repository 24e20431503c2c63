"""Batch normalisation over real processes against the plain formula, in float64, over the whole batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import on_all_ranks
from torch import Tensor, nn

from training.sync_batch_norm import SyncBatchNorm2d, convert

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("sync_norm_ranks.py")
CPU = torch.device("cpu")


def load_script() -> Any:
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


ranks = load_script()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return on_all_ranks(SCRIPT, tmp_path_factory.mktemp("gloo"), (2, 3))


def expected(case: Any) -> dict[str, Tensor]:
    """The second of two equal steps, by the formula; its gradients by autograd."""
    norm = ranks.module(case).double()
    x, dy = (part.double() for part in ranks.whole_batch(case))
    x.requires_grad_(True)
    weight, bias = norm.weight, norm.bias
    if not case.affine:
        weight, bias = torch.ones(case.channels).double(), torch.zeros(case.channels).double()
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    y = (x - mean) / (var + norm.eps).sqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    y.backward(dy)
    count = x[:, 0].numel()
    kept = 0.0 if case.momentum is None else (1 - case.momentum) ** 2
    unbiased = var.detach().flatten() * count / (count - 1)
    return {
        "y": y.detach(), "dx": x.grad,
        "running_mean": kept * norm.running_mean + (1 - kept) * mean.detach().flatten(),
        "running_var": kept * norm.running_var + (1 - kept) * unbiased,
        **({"weight": weight.grad, "bias": bias.grad} if case.affine else {}),
    }  # fmt: skip


def tolerance(case: Any) -> float:
    """Of the largest value: rounding of inputs this far from 0, and for bfloat16 two roundings to 8 bits."""
    if case.dtype == torch.float64:
        return 1e-14
    return 2**-7 if case.dtype == torch.bfloat16 else 2e-6 * max(1.0, case.offset / 50)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """As a share of the largest value."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ranks.CASES)
def test_all_ranks_together_are_one_batch(seen: dict[int, list[dict[str, Any]]], name: str) -> None:
    case = ranks.CASES[name]
    found = [rank[name] for rank in seen[len(case.images)]]
    wanted = expected(case)
    assert largest_difference(torch.cat([rank["y"] for rank in found]), wanted["y"]) < tolerance(case)
    if case.needs_input_gradient:
        assert largest_difference(torch.cat([rank["dx"] for rank in found]), wanted["dx"]) < tolerance(case)
    for parameter in found[0]["gradients"]:
        total = torch.stack([rank["gradients"][parameter].double() for rank in found]).sum(0)
        # Statistics and sums are never rounded to bfloat16.
        assert largest_difference(total, wanted[parameter]) < min(tolerance(case), 1e-4), parameter
    for rank in found:
        for buffer in ("running_mean", "running_var"):
            assert largest_difference(rank["buffers"][buffer], wanted[buffer]) < min(tolerance(case), 1e-4), buffer
        assert rank["buffers"]["num_batches_tracked"] == 2


@pytest.mark.parametrize("name", ranks.CASES)
def test_type_and_memory_order_are_those_of_the_input(seen: dict[int, list[dict[str, Any]]], name: str) -> None:
    case = ranks.CASES[name]
    for number, rank in enumerate(seen[len(case.images)]):
        given = ranks.whole_batch(case)[0].split(case.images)[number]
        for found in (rank[name]["y"], rank[name]["dx"]):
            if found is not None:
                assert found.dtype == case.dtype
                assert found.is_contiguous(memory_format=case.memory_format)
                assert found.shape == given.shape
        for tensor in (*rank[name]["gradients"].values(), rank[name]["buffers"]["running_var"]):
            assert tensor.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)


def test_running_statistics_are_the_same_on_all_ranks_to_the_last_bit(seen: dict[int, list[dict[str, Any]]]) -> None:
    one, *others = (rank["three ranks, batch of 8"]["buffers"] for rank in seen[3])
    for other in others:
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_ranks_on_their_own_would_differ(seen: dict[int, list[dict[str, Any]]]) -> None:
    """What the tests above compare is not what a rank finds in its own images."""
    case = ranks.CASES["uneven"]
    alone = torch.cat([ranks.module(case)(part).detach() for part in ranks.whole_batch(case)[0].split(case.images)])
    assert largest_difference(alone, expected(case)["y"]) > 0.01


def test_what_is_frozen_keeps_its_statistics_and_waits_for_nobody(seen: dict[int, list[dict[str, Any]]]) -> None:
    case = ranks.CASES["even"]
    plain = ranks.module(case).eval()
    for group in seen.values():
        assert torch.equal(group[0]["frozen"]["y"], plain(ranks.whole_batch(case)[0]))
        assert torch.equal(group[0]["frozen"]["running_mean"], plain.running_mean)


def test_a_rank_without_images_is_refused(seen: dict[int, list[dict[str, Any]]]) -> None:
    assert all("give every rank an image" in rank["empty"] for group in seen.values() for rank in group)


@pytest.mark.parametrize("name", ["even", "bfloat16", "cumulative average", "without weight and bias"])
@pytest.mark.parametrize("is_training", [True, False])
def test_alone_it_is_plain_batch_normalisation(name: str, is_training: bool) -> None:
    case = ranks.CASES[name]
    plain, synced = ranks.module(case).train(is_training), convert(ranks.module(case), CPU).train(is_training)
    results = []
    for norm in (plain, synced):
        x, dy = ranks.whole_batch(case)
        x.requires_grad_(True)
        y = norm(x)
        y.backward(dy)
        results.append([y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_conversion_keeps_every_tensor_name_and_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4).eval(), nn.ReLU()))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modes = {name: module.training for name, module in model.named_modules()}
    assert convert(model, CPU) is model
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert sum(type(module) is SyncBatchNorm2d for module in model.modules()) == 2
    assert type(convert(nn.BatchNorm2d(4), CPU)) is SyncBatchNorm2d


def test_on_a_gpu_it_is_the_one_that_torch_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weight = model[1].weight
    convert(model, torch.device("cuda"))
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].weight is weight

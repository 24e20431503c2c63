"""GF-FPN: exact counts, the attention module in closed form, and what each setting does."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.gf_fpn import (
    DESCRIPTOR_CHANNELS,
    FullChannelFusion,
    GuidedConfig,
    GuidedFPN,
    LocalSpatialAttention,
    PyramidalAttention,
    split_in_three,
)
from models.necks import FPN

# The stage at stride 4 of the top-down path, which the count of "FPN from F2" includes and no head would read.
UNREAD_STAGE = 206_336


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measured(name: str, num_classes: int, **settings: object) -> tuple[int, float]:
    """Parameters, and GFLOPs at 640 px."""
    with torch.device("meta"):
        detector = models.build(name, num_classes=num_classes, **settings).eval()
        with FlopCounterMode(display=False) as counter:
            detector(torch.empty(1, 3, 640, 640))
    return count(detector), counter.get_total_flops() / 1e9


@pytest.mark.parametrize(
    ("name", "num_classes", "total", "gflops"),
    [
        ("fpn-l", 9, 38_942_634 - UNREAD_STAGE, 135.27),
        ("fpn-l", 6, 38_940_321 - UNREAD_STAGE, None),
        ("panet-l", 9, 55_133_354, 174.07),
        ("panet-l", 6, 55_131_041, None),
        ("gf-fpn-l", 9, 39_753_712, 146.62),
        ("gf-fpn-l", 6, 39_751_399, None),
        ("gf-fpn-m", 9, 19_006_122, 69.78),
        ("gf-fpn-s", 9, 6_959_726, 25.50),
    ],
)
def test_totals_are_exact(name: str, num_classes: int, total: int, gflops: float | None) -> None:
    found, found_gflops = measured(name, num_classes, **({"norm": "none"} if name.startswith("gf") else {}))
    assert found == total
    assert gflops is None or found_gflops == pytest.approx(gflops, rel=0.001)


@pytest.mark.parametrize(("num_classes", "total"), [(9, 38_942_634), (6, 38_940_321)])
def test_with_the_stage_that_no_head_reads_an_fpn_has_the_stated_totals(num_classes: int, total: int) -> None:
    with torch.device("meta"):
        detector: Any = models.build("fpn-l", num_classes=num_classes).eval()
        without = count(detector)
        detector.neck = FPN(detector.backbone.out_channels, 3)
        with FlopCounterMode(display=False) as counter:
            detector(torch.empty(1, 3, 640, 640))
    assert count(detector) == total == without + UNREAD_STAGE
    assert counter.get_total_flops() / 1e9 == pytest.approx(144.50, rel=0.001)


@pytest.mark.parametrize("size", ["n", "s", "m", "l", "l-darknet53"])
def test_guidance_costs_more_than_none_and_less_than_a_second_path(size: str) -> None:
    plain, guided, second = (measured(f"{neck}-{size}", 6) for neck in ("fpn", "gf-fpn", "panet"))
    assert plain[0] < guided[0] < second[0]
    assert plain[1] < guided[1] < second[1]


@pytest.mark.parametrize(("channels", "out_channels"), [(128, 256), (256, 512), (512, 1024), (33, 66), (8, 16)])
def test_parameters_of_the_attention_module_have_a_closed_form(channels: int, out_channels: int) -> None:
    split = split_in_three(channels)
    assert sum(split) == channels
    assert max(split) - min(split) <= 2
    fixed = 9 * channels + sum(width**2 for width in split) + channels * out_channels
    for qk, descriptors in (("eq", 4 * DESCRIPTOR_CHANNELS), ("per_channel", 2 * channels * DESCRIPTOR_CHANNELS)):
        module = PyramidalAttention(channels, out_channels, qk, "none")  # type: ignore[arg-type]
        assert count(module) == fixed + descriptors
    paper = (9 + 2 * DESCRIPTOR_CHANNELS) * channels + channels**2 / 3 + channels * out_channels
    assert abs(count(module) - paper) < 4


def test_the_three_modules_of_size_l_have_the_known_totals() -> None:
    totals = [count(PyramidalAttention(c, 2 * c, "eq", "none")) for c in (128, 256, 512)]
    assert totals == [39_448, 155_286, 616_344]


@pytest.mark.parametrize("qk", ["eq", "per_channel"])
def test_the_attention_is_a_row_stochastic_matrix_of_channels_that_ignores_where_pixels_are(qk: str) -> None:
    fusion = FullChannelFusion(12, 24, qk, "none")  # type: ignore[arg-type]
    x = torch.randn(2, 12, 5, 7)
    attention = fusion.attention(x)
    assert attention.shape == (2, 12, 12)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 12))
    shuffled = x.flatten(2)[:, :, torch.randperm(35)].unflatten(2, (5, 7))
    torch.testing.assert_close(fusion.attention(shuffled), attention)


def test_the_mixture_follows_the_equations() -> None:
    """A loop over channels, straight from section 2.2.1, with X_j for the misprinted X_c."""
    fusion = FullChannelFusion(6, 6, "eq", "none")
    nn.init.eye_(fusion.output[0].weight.data.view(6, 6))
    x = torch.randn(1, 6, 3, 4)
    got = fusion(x)[0]
    query = [fusion.query @ torch.stack((c.mean(), c.max())) for c in x[0]]
    key = [fusion.key @ torch.stack((c.mean(), c.max())) for c in x[0]]
    for c in range(6):
        scores = torch.stack([query[c] @ key[j] for j in range(6)]) / math.sqrt(DESCRIPTOR_CHANNELS)
        expected = sum(weight * x[0, j] for j, weight in enumerate(scores.softmax(0)))
        torch.testing.assert_close(got[c], expected)


def test_without_queries_all_channels_become_one() -> None:
    fusion = FullChannelFusion(9, 4, "eq", "none")
    nn.init.zeros_(fusion.query)
    attention = fusion.attention(torch.randn(1, 9, 4, 4))
    torch.testing.assert_close(attention, torch.full((1, 9, 9), 1 / 9))
    fusion.output = nn.Sequential()
    mixed = fusion(torch.randn(1, 9, 4, 4))
    torch.testing.assert_close(mixed, mixed[:, :1].expand(-1, 9, -1, -1))


@pytest.mark.parametrize(("height", "width"), [(33, 31), (16, 20), (1, 2)])
@pytest.mark.parametrize("channels", [9, 32, 128])
def test_odd_sizes_and_widths_that_three_does_not_divide(channels: int, height: int, width: int) -> None:
    module = PyramidalAttention(channels, 2 * channels, "eq", "none")
    guidance = module(torch.randn(2, channels, height, width))
    assert guidance.shape == (2, 2 * channels, math.ceil(height / 2), math.ceil(width / 2))


def test_the_branches_see_three_five_and_seven_pixels() -> None:
    attention = LocalSpatialAttention(3, "none")
    for branch in attention.branches:
        for conv in (branch[0], branch[1]):
            nn.init.ones_(conv.weight)
    for index, reach in enumerate((3, 5, 7)):
        seen = set()
        for pixel in range(15):
            x = torch.zeros(1, 3, 15, 15)
            x[0, index, 8, pixel] = 1
            # Output 4 is centred on input 8.
            if attention(x)[0, index, :, 4].any():
                seen.add(pixel)
        assert (min(seen), max(seen)) == (8 - reach // 2, 8 + reach // 2)


def guided_neck(**settings: object) -> GuidedFPN:
    torch.manual_seed(0)
    return GuidedFPN((8, 16, 32, 64), 1, GuidedConfig(0.33, 0.25, **settings)).eval()  # type: ignore[arg-type]


def maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((8, 32), (16, 16), (32, 8), (64, 4))
    return [torch.randn(2, channels, side, side, generator=generator) for channels, side in sizes]


@pytest.mark.parametrize(("fuse", "expected"), [("star", lambda f: 0.5 * f), ("add", lambda f: 0.5 + f)])
@pytest.mark.parametrize("residual", [True, False])
def test_without_guidance_half_of_a_level_remains(fuse: str, residual: bool, expected: object) -> None:
    neck = guided_neck(fuse=fuse, residual=residual)
    for guide in neck.guides:
        nn.init.zeros_(guide[1].output[0].weight)
    fused = [*neck.top_down(maps())[0], maps()[-1]]
    for got, level in zip(neck(maps()), fused[1:], strict=True):
        torch.testing.assert_close(got, expected(level))  # type: ignore[operator]


def test_outputs_are_gated_levels_plus_their_guidance() -> None:
    neck = guided_neck()
    fused = [*neck.top_down(maps())[0], maps()[-1]]
    for got, guide, (fine, coarse) in zip(neck(maps()), neck.guides, itertools.pairwise(fused), strict=True):
        guidance = guide(fine)
        torch.testing.assert_close(got, guidance.sigmoid() * coarse + guidance)
        assert got.shape == coarse.shape


def test_neither_fusion_nor_residual_changes_parameters_or_operations() -> None:
    settings = itertools.product(("star", "add"), (True, False))
    assert len({measured("gf-fpn-n", 6, fuse=fuse, residual=residual) for fuse, residual in settings}) == 1


def test_guidance_replaces_the_bottom_up_path_level_for_level() -> None:
    with torch.device("meta"):
        heads = [models.build(name, num_classes=6).eval().features(torch.empty(1, 3, 96, 160))
                 for name in ("fpn-s", "panet-s", "gf-fpn-s")]  # fmt: skip
    shapes = [[tuple(level.shape) for level in one] for one in heads]
    assert shapes[0] == shapes[1] == shapes[2] == [(1, 128, 12, 20), (1, 256, 6, 10), (1, 512, 3, 5)]


@pytest.mark.parametrize("qk", ["eq", "per_channel"])
def test_gradients_reach_queries_and_keys_unless_all_channels_look_alike(qk: str) -> None:
    fusion = FullChannelFusion(6, 8, qk, "none")  # type: ignore[arg-type]
    fusion(torch.randn(1, 6, 4, 4)).square().sum().backward()
    assert fusion.query.grad.any()
    assert fusion.key.grad.any()
    fusion.zero_grad()
    fusion(torch.ones(1, 6, 4, 4)).square().sum().backward()
    assert fusion.query.grad.abs().max() < 1e-5
    assert fusion.key.grad.abs().max() < 1e-5


def test_darknet53_has_its_published_size() -> None:
    """40.6 M without the classifier, and maps of 128 to 1024 channels."""
    with torch.device("meta"):
        backbone = models.build("fpn-l-darknet53", num_classes=1).backbone
        features = backbone(torch.empty(1, 3, 64, 96))
    assert count(backbone) == 40_584_928
    assert [tuple(x.shape[1:]) for x in features] == [(128, 16, 24), (256, 8, 12), (512, 4, 6), (1024, 2, 3)]


@pytest.mark.parametrize("name", ["bifpn-l", "afpn-l"])
def test_other_necks_keep_size_and_position(name: str) -> None:
    """A single bright pixel of the finest map moves the outputs around itself most."""
    torch.manual_seed(0)
    detector = models.build(name, num_classes=2, width=0.25, depth=0.33).eval()
    features = [torch.zeros(1, c, 64 // 2**i, 64 // 2**i) for i, c in enumerate(detector.backbone.out_channels)]
    before = detector.neck(features)[-3:]
    features[0][0, :, 40, 8] = 100
    for level, (x, y) in enumerate(zip(detector.neck(features)[-3:], before, strict=True)):
        moved = (x - y).abs().sum((0, 1))
        row, column = divmod(int(moved.argmax()), moved.shape[1])
        assert abs(row - 40 / 2 ** (level + 1)) <= 1
        assert abs(column - 8 / 2 ** (level + 1)) <= 1

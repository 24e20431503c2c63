from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.backbones import CSPDarknet
from models.blocks import Bottleneck, ConvBlock, SpaceToDepthStem, SpatialPyramidPooling
from models.necks import PAFPN, TopDownPath


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_space_to_depth_takes_top_left_bottom_left_top_right_bottom_right(layout: torch.memory_format) -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.uint8).reshape(2, 3, 4, 6).to(memory_format=layout)
    corners = [images[..., row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.equal(SpaceToDepthStem.rearrange(images), torch.cat(corners, dim=1))


def test_uint8_and_float_images_give_the_same_features() -> None:
    stem = SpaceToDepthStem(8).eval()
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stem(images), stem(images.float()))


def test_pyramid_pooling_equals_pools_of_5_9_and_13() -> None:
    pooling = SpatialPyramidPooling(8, 6).eval()
    x = torch.randn(2, 8, 15, 11, generator=torch.Generator().manual_seed(0))
    reduced = pooling.reduce(x)
    pools = [F.max_pool2d(reduced, size, stride=1, padding=size // 2) for size in (5, 9, 13)]
    torch.testing.assert_close(pooling(x), pooling.merge(torch.cat((reduced, *pools), dim=1)))


def test_batch_normalisation_is_the_published_one() -> None:
    norms = [module for module in CSPDarknet(0.33, 0.25).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_bottleneck_adds_its_input_only_with_a_shortcut() -> None:
    plain, residual = Bottleneck(4, shortcut=False).eval(), Bottleneck(4, shortcut=True).eval()
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(residual(x), plain(x) + x)


def test_backbone_strides_and_widths() -> None:
    backbone = CSPDarknet(0.33, 0.25).eval()
    shapes = [tuple(x.shape[1:]) for x in backbone(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)]
    assert backbone.out_channels == (32, 64, 128, 256)


def test_the_last_stage_has_no_shortcut() -> None:
    stages = CSPDarknet(0.33, 0.25).stages
    shortcuts = [{m.shortcut for m in stage.modules() if isinstance(m, Bottleneck)} for stage in stages]
    assert shortcuts == [{True}, {True}, {True}, {False}]


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 32), (4, 8, 16, 32)])
def test_neck_keeps_the_shapes_of_any_number_of_levels(channels: tuple[int, ...]) -> None:
    sizes = [2 ** (len(channels) - level) for level in range(len(channels))]
    features = [torch.randn(1, c, 3 * size, 2 * size) for c, size in zip(channels, sizes, strict=True)]
    outputs = PAFPN(channels, 1).eval()(features)
    assert [x.shape for x in outputs] == [x.shape for x in features]


def test_context_flows_down_in_the_top_down_path_and_up_in_the_neck() -> None:
    """Changing one input level changes exactly the outputs that its context can reach."""
    torch.manual_seed(0)
    features = [torch.randn(1, c, s, s) for c, s in ((8, 16), (16, 8), (32, 4))]
    top_down, neck = TopDownPath((8, 16, 32), 1).eval(), PAFPN((8, 16, 32), 1).eval()
    for level in range(3):
        changed = [x + 1.0 if index == level else x for index, x in enumerate(features)]
        fused, again = top_down(features)[0], top_down(changed)[0]
        moved = [not torch.equal(a, b) for a, b in zip(fused, again, strict=True)]
        assert moved == [index <= level for index in range(2)]
        assert all(not torch.equal(a, b) for a, b in zip(neck(features), neck(changed), strict=True))


def test_conv_block_order_is_convolution_normalisation_silu() -> None:
    block = ConvBlock(3, 4, 3, stride=2).eval()
    block.norm.running_mean.fill_(0.3)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = F.conv2d(x, block.conv.weight, stride=2, padding=1)
    y = (y - 0.3) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(block(x), y * torch.sigmoid(y))

"""Necks: feature maps of a backbone to feature maps of equal size, each informed by the others.

All lists of levels run from the finest to the coarsest. A neck is given all maps of a backbone and reads the last ones,
as many as it has levels; `out_channels` are the widths of its own maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import C2f, ConvBlock, CSPLayer, spatial_conv


class TopDownPath(nn.Module):
    """Carries context from coarse to fine levels: reduce by 1x1, upsample, concatenate, CSP layer."""

    def __init__(self, channels: Sequence[int], num_blocks: int, *, depthwise: bool = False) -> None:
        super().__init__()
        steps = list(itertools.pairwise(channels))
        self.laterals = nn.ModuleList(ConvBlock(coarse, fine, 1) for fine, coarse in steps)
        self.layers = nn.ModuleList(
            CSPLayer(2 * fine, fine, num_blocks, shortcut=False, depthwise=depthwise) for fine, _ in steps
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the fused maps of all levels but the coarsest, and the reduced maps of all but the finest.

        Fused map i has the size and width of `features[i]`; reduced map i the size of `features[i + 1]` and
        the width of `features[i]`.
        """
        fused: list[Tensor] = []
        reduced: list[Tensor] = []
        x = features[-1]
        for level in reversed(range(len(self.layers))):
            lateral = self.laterals[level](x)
            x = self.layers[level](torch.cat((upsample(lateral), features[level]), dim=1))
            fused.insert(0, x)
            reduced.insert(0, lateral)
        return fused, reduced


class PAFPN(nn.Module):
    """Path-aggregation feature pyramid of YOLOX for any number of levels: a top-down, then a bottom-up path."""

    def __init__(self, channels: Sequence[int], num_blocks: int, *, depthwise: bool = False) -> None:
        super().__init__()
        self.out_channels = tuple(channels)
        steps = list(itertools.pairwise(channels))
        self.top_down = TopDownPath(channels, num_blocks, depthwise=depthwise)
        self.downsamples = nn.ModuleList(spatial_conv(fine, fine, 3, 2, depthwise=depthwise) for fine, _ in steps)
        self.layers = nn.ModuleList(
            CSPLayer(2 * fine, coarse, num_blocks, shortcut=False, depthwise=depthwise) for fine, coarse in steps
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level, with the size and width of its input."""
        fused, reduced = self.top_down(features[-len(self.out_channels) :])
        outputs = [fused[0]]
        for downsample, layer, lateral in zip(self.downsamples, self.layers, reduced, strict=True):
            outputs.append(layer(torch.cat((downsample(outputs[-1]), lateral), dim=1)))
        return outputs


class FPN(nn.Module):
    """Feature pyramid by concatenation (as YOLOX fuses): the top-down path alone; the coarsest map passes through."""

    def __init__(self, channels: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        self.out_channels = tuple(channels)
        self.top_down = TopDownPath(channels, num_blocks)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level, with the size and width of its input."""
        return [*self.top_down(features[-len(self.out_channels) :])[0], features[-1]]


class C2fPAFPN(nn.Module):
    """Neck of YOLOv8: a top-down, then a bottom-up path of `C2f` layers, with no 1x1 between the levels."""

    def __init__(self, channels: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        self.out_channels = tuple(channels)
        steps = list(itertools.pairwise(channels))
        self.top_down = nn.ModuleList(C2f(coarse + fine, fine, num_blocks, shortcut=False) for fine, coarse in steps)
        self.downsamples = nn.ModuleList(ConvBlock(fine, fine, 3, 2) for fine, _ in steps)
        self.bottom_up = nn.ModuleList(C2f(fine + coarse, coarse, num_blocks, shortcut=False) for fine, coarse in steps)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level, with the size and width of its input."""
        features = features[-len(self.out_channels) :]
        fused = [features[-1]]
        for layer, lateral in zip(reversed(self.top_down), reversed(features[:-1]), strict=True):
            fused.insert(0, layer(torch.cat((upsample(fused[0]), lateral), dim=1)))
        outputs = [fused[0]]
        for downsample, layer, lateral in zip(self.downsamples, self.bottom_up, fused[1:], strict=True):
            outputs.append(layer(torch.cat((downsample(outputs[-1]), lateral), dim=1)))
        return outputs


class WeightedSum(nn.Module):
    """Fast normalised fusion: maps of equal shape, each with a learned weight of at least 0, the weights adding to 1.

    Source: Eq. in section 3.3, Tan et al. 2020, "EfficientDet".
    """

    def __init__(self, num_inputs: int, channels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.conv = spatial_conv(channels, channels, 3, depthwise=True)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps (B, C, H, W), as many as inputs, to one."""
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        total: Tensor = torch.stack([weight * x for weight, x in zip(weights, maps, strict=True)]).sum(0)
        fused: Tensor = self.conv(total)
        return fused


class BiFPNLayer(nn.Module):
    """One pass down and up over maps of equal width; inner levels also get their own input again on the way up."""

    def __init__(self, num_levels: int, channels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(WeightedSum(2, channels) for _ in range(num_levels - 1))
        self.up = nn.ModuleList(WeightedSum(3, channels) for _ in range(num_levels - 2))
        self.last = WeightedSum(2, channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level, of the size and width of its input."""
        middle = [features[-1]]
        for fuse, x in zip(reversed(self.down), reversed(features[:-1]), strict=True):
            middle.insert(0, fuse(x, upsample(middle[0])))
        outputs = [middle[0]]
        for fuse, x, inner in zip(self.up, features[1:-1], middle[1:-1], strict=True):
            outputs.append(fuse(x, inner, halve(outputs[-1])))
        return [*outputs, self.last(features[-1], halve(outputs[-1]))]


class BiFPN(nn.Module):
    """Weighted bidirectional pyramid (Tan et al. 2020, "EfficientDet", section 3): layers over maps of one width."""

    def __init__(self, channels: Sequence[int], width: int, num_layers: int) -> None:
        super().__init__()
        self.out_channels = (width,) * len(channels)
        self.inputs = nn.ModuleList(ConvBlock(one, width, 1) for one in channels)
        self.layers = nn.Sequential(*(BiFPNLayer(len(channels), width) for _ in range(num_layers)))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level, with the size of its input."""
        maps: list[Tensor] = self.layers([project(x) for project, x in zip(self.inputs, features, strict=True)])
        return maps


class AdaptiveFusion(nn.Module):
    """Adaptively spatial fusion: per pixel, a softmax over the levels says how much of each goes into the output.

    Source: Eq. (1), Yang et al. 2023, "AFPN: Asymptotic feature pyramid network".
    """

    COMPRESSED_CHANNELS = 8

    def __init__(self, num_inputs: int, channels: int) -> None:
        super().__init__()
        compressed = self.COMPRESSED_CHANNELS
        self.compress = nn.ModuleList(ConvBlock(channels, compressed, 1) for _ in range(num_inputs))
        self.weigh = nn.Conv2d(num_inputs * compressed, num_inputs, 1)
        self.conv = ConvBlock(channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W), as many as inputs, to one."""
        compressed = [compress(x) for compress, x in zip(self.compress, maps, strict=True)]
        weights = self.weigh(torch.cat(compressed, dim=1)).softmax(dim=1)
        total = torch.stack([weights[:, index : index + 1] * x for index, x in enumerate(maps)]).sum(0)
        fused: Tensor = self.conv(total)
        return fused


class AsymptoticStage(nn.Module):
    """Every output level fuses all input levels, brought to its size and width, and is refined by residual blocks."""

    def __init__(self, channels: Sequence[int], out_levels: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        self.resize = nn.ModuleList(
            nn.ModuleList(_resizer(channels, source, target) for source in range(len(channels)))
            for target in out_levels
        )
        self.fuse = nn.ModuleList(AdaptiveFusion(len(channels), channels[target]) for target in out_levels)
        self.refine = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(channels[target]) for _ in range(num_blocks))) for target in out_levels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per output level."""
        outputs = []
        for resizers, fuse, refine in zip(self.resize, self.fuse, self.refine, strict=True):
            assert isinstance(resizers, nn.ModuleList)
            maps = [resize(x) for resize, x in zip(resizers, features, strict=True)]
            outputs.append(refine(fuse(maps)))
        return outputs


class ResidualBlock(nn.Module):
    """Two 3x3 blocks, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(ConvBlock(channels, channels, 3), ConvBlock(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y: Tensor = x + self.layers(x)
        return y


class AFPN(nn.Module):
    """Asymptotic feature pyramid (Yang et al. 2023): two fine levels are fused first, then each coarser one joins.

    The maps of `channels` are halved in width inside, and leave with it restored, the finest excepted: it informs the
    others, and no head reads it.
    """

    def __init__(self, channels: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        self.out_channels = tuple(channels[1:])
        inner = [one // 2 for one in channels]
        levels = range(len(channels))
        self.inputs = nn.ModuleList(ConvBlock(one, half, 1) for one, half in zip(channels, inner, strict=True))
        self.stages = nn.ModuleList(AsymptoticStage(inner[:count], levels[:count], num_blocks) for count in levels[2:])
        self.stages.append(AsymptoticStage(inner, levels[1:], num_blocks))
        self.outputs = nn.ModuleList(ConvBlock(half, one, 1) for one, half in zip(channels[1:], inner[1:], strict=True))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level but the finest, with the size and width of its input."""
        inputs = [project(x) for project, x in zip(self.inputs, features, strict=True)]
        maps = inputs[:2]
        for stage, joining in zip(self.stages, (*inputs[2:], None), strict=True):
            maps = stage(maps)
            if joining is not None:
                maps.append(joining)
        return [project(x) for project, x in zip(self.outputs, maps, strict=True)]


def _resizer(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """Return what brings a map from level `source` to the size and width of level `target`."""
    if source == target:
        return nn.Identity()
    if source < target:
        factor = 2 ** (target - source)
        return ConvBlock(channels[source], channels[target], factor, factor)
    factor = 2 ** (source - target)
    up = nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False)
    return nn.Sequential(ConvBlock(channels[source], channels[target], 1), up)


def upsample(x: Tensor) -> Tensor:
    """Return (B, C, 2 H, 2 W), each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halve(x: Tensor) -> Tensor:
    """Return (B, C, H / 2, W / 2): the largest of each 3x3 neighbourhood."""
    return F.max_pool2d(x, 3, stride=2, padding=1)

"""Necks: feature maps of a backbone to feature maps of equal size, each informed by the others.

All lists of levels run from the finest to the coarsest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ConvBlock, CSPLayer, spatial_conv


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
            up = F.interpolate(lateral, scale_factor=2.0, mode="nearest")
            x = self.layers[level](torch.cat((up, features[level]), dim=1))
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
        fused, reduced = self.top_down(features)
        outputs = [fused[0]]
        for downsample, layer, lateral in zip(self.downsamples, self.layers, reduced, strict=True):
            outputs.append(layer(torch.cat((downsample(outputs[-1]), lateral), dim=1)))
        return outputs

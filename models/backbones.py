"""Backbones: images to feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import CSPLayer, SpaceToDepthStem, SpatialPyramidPooling, spatial_conv


def scaled_repeats(repeats: int, depth: float) -> int:
    """Return a block count scaled by the depth multiplier, at least 1."""
    return max(round(repeats * depth), 1)


class CSPDarknet(nn.Module):
    """CSPDarknet (Ge et al. 2021): four stages after a space-to-depth stem.

    `out_channels` are the widths (2b, 4b, 8b, 16b) of the maps at strides 4, 8, 16, 32, with b = int(64 width).
    """

    def __init__(self, depth: float, width: float, *, depthwise: bool = False) -> None:
        super().__init__()
        base = int(64 * width)
        blocks = scaled_repeats(3, depth)
        self.out_channels = (2 * base, 4 * base, 8 * base, 16 * base)
        self.stem = SpaceToDepthStem(base)
        self.stages = nn.ModuleList()
        in_channels = base
        for channels, num_blocks in zip(self.out_channels, (blocks, 3 * blocks, 3 * blocks, blocks), strict=True):
            is_last = channels == self.out_channels[-1]
            layers = [spatial_conv(in_channels, channels, 3, 2, depthwise=depthwise)]
            if is_last:
                layers.append(SpatialPyramidPooling(channels, channels))
            layers.append(CSPLayer(channels, channels, num_blocks, shortcut=not is_last, depthwise=depthwise))
            self.stages.append(nn.Sequential(*layers))
            in_channels = channels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to four maps, finest first."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return tuple(features)

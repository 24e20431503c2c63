"""Convolution blocks shared by the architectures.

Shapes: B images, C channels, H x W feature map. The stem emits channels_last, whatever it is given, and the other
blocks keep that: on CPU it is the faster format in float32 too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which every operation keeps the precision of its inputs; on `meta` there is no other."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return batch normalisation as YOLOX and YOLOv8 set it."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


class ConvBlock(nn.Module):
    """Convolution without bias, batch normalisation, an activation (SiLU); stride 1 keeps H and W."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # An even kernel is a patch of its own, without neighbours.
        padding = kernel // 2 if kernel % 2 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.norm = batch_norm(out_channels)
        # Not in place: autograd would first copy the input that the gradient needs.
        self.activation = nn.SiLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y


def spatial_conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, depthwise: bool = False
) -> nn.Module:
    """Return a dense convolution block, or its separable form: depthwise, then 1x1."""
    if not depthwise:
        return ConvBlock(in_channels, out_channels, kernel, stride)
    return nn.Sequential(
        ConvBlock(in_channels, in_channels, kernel, stride, groups=in_channels),
        ConvBlock(in_channels, out_channels, 1),
    )


class SpaceToDepthStem(nn.Module):
    """Images (B, 3, H, W) to features (B, C, H/2, W/2): each 2x2 patch becomes 12 channels, then a 3x3 block."""

    def __init__(self, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.block = ConvBlock(12, out_channels, kernel)

    @staticmethod
    def rearrange(images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 12, H/2, W/2) channels_last: top left, bottom left, top right, bottom right."""
        batch, channels, height, width = images.shape
        patches = images.reshape(batch, channels, height // 2, 2, width // 2, 2)
        pixels = patches.permute(0, 2, 4, 5, 3, 1).reshape(batch, height // 2, width // 2, 4 * channels)
        return pixels.permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float (B, 3, H, W), H and W even, to (B, C, H/2, W/2)."""
        # Rearranged before the cast: uint8 moves a quarter of the bytes.
        y: Tensor = self.block(self.rearrange(images).to(self.block.conv.weight.dtype))
        return y


class Bottleneck(nn.Module):
    """1x1 then 3x3 block on C channels, with a residual connection when `shortcut`."""

    def __init__(self, channels: int, *, shortcut: bool, depthwise: bool = False) -> None:
        super().__init__()
        self.reduce = ConvBlock(channels, channels, 1)
        self.spatial = spatial_conv(channels, channels, 3, depthwise=depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y: Tensor = self.spatial(self.reduce(x))
        return x + y if self.shortcut else y


class CSPLayer(nn.Module):
    """Cross-stage partial layer: half of the channels pass `num_blocks` bottlenecks, half go around them."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, *, shortcut: bool, depthwise: bool = False
    ) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.main = ConvBlock(in_channels, hidden, 1)
        self.bypass = ConvBlock(in_channels, hidden, 1)
        self.blocks = nn.Sequential(
            *(Bottleneck(hidden, shortcut=shortcut, depthwise=depthwise) for _ in range(num_blocks))
        )
        self.merge = ConvBlock(2 * hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        y: Tensor = self.merge(torch.cat((self.blocks(self.main(x)), self.bypass(x)), dim=1))
        return y


class C2f(nn.Module):
    """YOLOv8's cross-stage layer: one half passes a chain of `num_blocks` bottlenecks, and the output of every
    bottleneck reaches the merging 1x1.
    """

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, shortcut: bool) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.split = ConvBlock(in_channels, 2 * hidden, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvBlock(hidden, hidden, 3), ConvBlock(hidden, hidden, 3)) for _ in range(num_blocks)
        )
        self.merge = ConvBlock((2 + num_blocks) * hidden, out_channels, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        parts = list(self.split(x).chunk(2, dim=1))
        for block in self.blocks:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        merged: Tensor = self.merge(torch.cat(parts, dim=1))
        return merged


class SpatialPyramidPooling(nn.Module):
    """Concatenates max-pools of 5, 9 and 13 pixels: context at the coarsest level (YOLOX's SPP, YOLOv8's SPPF)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.reduce = ConvBlock(in_channels, hidden, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.merge = ConvBlock(4 * hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        x = self.reduce(x)
        # A 5-pool of a 5-pool is a 9-pool, and once more a 13-pool: equal values, less work.
        pool5 = self.pool(x)
        pool9 = self.pool(pool5)
        y: Tensor = self.merge(torch.cat((x, pool5, pool9, self.pool(pool9)), dim=1))
        return y

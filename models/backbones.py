"""Backbones: images to feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .blocks import C2f, ConvBlock, CSPLayer, SpaceToDepthStem, SpatialPyramidPooling, spatial_conv


def scaled_repeats(repeats: int, depth: float) -> int:
    """Return a block count scaled by the depth multiplier, at least 1."""
    return max(round(repeats * depth), 1)


def check_images(images: Tensor, largest_stride: int) -> None:
    """Raise ValueError unless `images` is (B, 3, H, W) with H and W multiples of the largest stride."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"images of shape {shape} must be (B, 3, H, W). Stack BGR images, channels first.")
    if shape[2] % largest_stride or shape[3] % largest_stride:
        raise ValueError(
            f"image size {shape[2]} x {shape[3]} (H x W) must be a multiple of {largest_stride}, the largest stride, "
            f"in both. Pad or resize the batch, for example to {_ceil(shape[2], largest_stride)} x "
            f"{_ceil(shape[3], largest_stride)}."
        )


def _ceil(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


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
        return run_stages(self.stages, self.stem(images))


class Darknet53(nn.Module):
    """Darknet-53 (Redmon and Farhadi 2018, "YOLOv3", table 1): four stages of residual pairs after a stem.

    `out_channels` are the widths (128, 256, 512, 1024) times `width` at strides 4, 8, 16, 32; `depth` scales the
    2, 8, 8, 4 pairs of a 1x1 and a 3x3 convolution.
    """

    def __init__(self, depth: float = 1.0, width: float = 1.0) -> None:
        super().__init__()
        base = int(32 * width)
        self.out_channels = (4 * base, 8 * base, 16 * base, 32 * base)
        self.stem = _leaky(3, base, 3)
        self.to_stride_2 = nn.Sequential(_leaky(base, 2 * base, 3, 2), ResidualPair(2 * base))
        self.stages = nn.ModuleList()
        in_channels = 2 * base
        for channels, repeats in zip(self.out_channels, (2, 8, 8, 4), strict=True):
            pairs = (ResidualPair(channels) for _ in range(scaled_repeats(repeats, depth)))
            self.stages.append(nn.Sequential(_leaky(in_channels, channels, 3, 2), *pairs))
            in_channels = channels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to four maps, finest first."""
        return run_stages(self.stages, self.to_stride_2(self.stem(as_input(images, self.stem))))


class ResidualPair(nn.Module):
    """1x1 to half the channels, 3x3 back, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = _leaky(channels, channels // 2, 1)
        self.spatial = _leaky(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y: Tensor = x + self.spatial(self.reduce(x))
        return y


def _leaky(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> ConvBlock:
    return ConvBlock(in_channels, out_channels, kernel, stride, activation=nn.LeakyReLU(0.1))


class C2fDarknet(nn.Module):
    """The backbone of YOLOv8: four stages of `C2f` after a strided convolution.

    `widths` are those of the stem at stride 2 and of the maps at strides 4, 8, 16 and 32.
    """

    def __init__(self, widths: tuple[int, ...], depth: float) -> None:
        super().__init__()
        self.out_channels = widths[1:]
        self.stem = ConvBlock(3, widths[0], 3, 2)
        stages = [
            c2f_stage(fine, coarse, scaled_repeats(repeats, depth))
            for fine, coarse, repeats in zip(widths, self.out_channels, (3, 6, 6, 3), strict=False)
        ]
        stages[-1].append(SpatialPyramidPooling(widths[-1], widths[-1]))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to four maps, finest first."""
        return run_stages(self.stages, self.stem(as_input(images, self.stem)))


def c2f_stage(in_channels: int, out_channels: int, num_blocks: int, stride: int = 2) -> nn.Sequential:
    """Return a 3x3 convolution of that stride and a `C2f`; without the convolution at stride 1."""
    layer = C2f(out_channels, out_channels, num_blocks, shortcut=True)
    return nn.Sequential(ConvBlock(in_channels, out_channels, 3, stride), layer) if stride > 1 else nn.Sequential(layer)


def as_input(images: Tensor, stem: ConvBlock) -> Tensor:
    """Return images (B, 3, H, W) in the precision of the stem's weights and in channels-last memory order."""
    return images.to(stem.conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def run_stages(stages: nn.ModuleList, x: Tensor) -> tuple[Tensor, ...]:
    """Return what each stage makes of the output of the one before."""
    features = []
    for stage in stages:
        x = stage(x)
        features.append(x)
    return tuple(features)

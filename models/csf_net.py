"""CSF-Net ("Cross-stage fusion network with dual backbone", Sensors 2026, 26(4), 1387): a reconstruction.

Only the paper's abstract was at hand. It says: YOLOv8 is the baseline; two backbones see the image; the shallow one
keeps a higher resolution, the deep one extracts context; progressive connections across stages fuse them early. Widths,
repeats, the form of the fusion and its direction are choices made here, and no number of the paper is claimed.

Shapes: B images, C channels; strides after the name of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .backbones import C2fDarknet, as_input, c2f_stage, run_stages, scaled_repeats
from .blocks import ConvBlock, batch_norm
from .interface import Architecture
from .yolov8 import SIZES, Yolov8, Yolov8Config, around_backbone

FuseOp = Literal["cat", "sum"]


@dataclass(frozen=True)
class CsfNetConfig(Yolov8Config):
    """`op`: a fusion concatenates and mixes by 1x1 ("cat"), or adds an aligned map that starts at zero ("sum")."""

    op: FuseOp = "cat"


class ConcatFusion(nn.Module):
    """DFuse with `op="cat"`: both maps side by side, mixed by a 1x1 block. `stride` 2 first halves the shallow map."""

    def __init__(self, channels: int, shallow_channels: int, stride: int) -> None:
        super().__init__()
        self.align = nn.Identity() if stride == 1 else ConvBlock(shallow_channels, channels, 3, stride)
        self.mix = ConvBlock(channels + (shallow_channels if stride == 1 else channels), channels, 1)

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """Deep (B, C, h, w) and shallow (B, C', stride h, stride w) to (B, C, h, w)."""
        mixed: Tensor = self.mix(torch.cat((deep, self.align(shallow)), dim=1))
        return mixed


class SumFusion(nn.Module):
    """DFuse with `op="sum"`: the deep map plus the shallow one, aligned by a convolution whose normalisation starts at
    zero: at the start the detector is exactly the YOLOv8 around its deep backbone.
    """

    def __init__(self, channels: int, shallow_channels: int, stride: int) -> None:
        super().__init__()
        kernel = 1 if stride == 1 else 3
        conv = nn.Conv2d(shallow_channels, channels, kernel, stride, kernel // 2, bias=False)
        norm = batch_norm(channels)
        nn.init.zeros_(norm.weight)
        self.align = nn.Sequential(conv, norm)

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """Deep (B, C, h, w) and shallow (B, C', stride h, stride w) to (B, C, h, w)."""
        fused: Tensor = deep + self.align(shallow)
        return fused


class DualBackbone(nn.Module):
    """YOLOv8's backbone, and beside it a shallow one that stops at stride 8; fused at strides 4, 8 and 16.

    Each fused map feeds the next deep stage, and the neck.
    """

    def __init__(self, widths: tuple[int, ...], depth: float, op: FuseOp) -> None:
        super().__init__()
        stem, c2, c3, c4, _ = widths
        repeats = scaled_repeats(3, depth)
        fusion = ConcatFusion if op == "cat" else SumFusion
        self.out_channels = widths[1:]
        self.deep = C2fDarknet(widths, depth)
        self.shallow_stem = ConvBlock(3, stem, 3, 2)
        # The last keeps stride 8, where the deep backbone goes on to 16.
        self.shallow_stages = nn.ModuleList(
            (c2f_stage(stem, c2, repeats), c2f_stage(c2, c3, repeats), c2f_stage(c3, c3, repeats, stride=1))
        )
        self.fusions = nn.ModuleList((fusion(c2, c2, 1), fusion(c3, c3, 1), fusion(c4, c3, 2)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to four maps, finest first."""
        images = as_input(images, self.shallow_stem)
        details = run_stages(self.shallow_stages, self.shallow_stem(images))
        deep = self.deep.stem(images)
        features = []
        for stage, fusion, detail in zip(self.deep.stages, self.fusions, details, strict=False):
            deep = fusion(stage(deep), detail)
            features.append(deep)
        return (*features, self.deep.stages[-1](deep))


def build_csf_net(config: CsfNetConfig, num_classes: int) -> Yolov8:
    """Return an initialised detector."""
    return around_backbone(DualBackbone(config.widths, config.depth, config.op), config, num_classes)


CSF_NET_SIZES = tuple(Architecture(f"csf-net-{size}", CsfNetConfig(*SIZES[size]), build_csf_net) for size in "nsm")

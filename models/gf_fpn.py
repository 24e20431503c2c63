"""GF-FPN ("Guided focus feature pyramid network", Information 2026, 17(1), 25), and the necks it is compared with.

One detector, several necks: a Darknet, a neck over its maps at strides 4 to 32, and YOLOX's decoupled head with SimOTA
on the neck's maps at strides 8 to 32.

Shapes: B images, C channels, d descriptor channels; h x w a level's map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .assigners import SimOTA
from .backbones import CSPDarknet, Darknet53, scaled_repeats
from .blocks import batch_norm, without_autocast
from .heads import DecoupledHead
from .interface import Architecture
from .losses import complete_iou_loss
from .necks import AFPN, FPN, PAFPN, BiFPN, TopDownPath
from .yolox import MULTIPLIERS, STRIDES, Yolox, check_multipliers

Backbone = Literal["csp-darknet", "darknet53"]
Fuse = Literal["star", "add"]
QueryKey = Literal["eq", "per_channel"]
Norm = Literal["none", "bn"]

# d, which the paper does not give: the rank of Q^T K is at most 2 whatever it is.
DESCRIPTOR_CHANNELS = 16
BIFPN_LAYERS = 3


@dataclass(frozen=True)
class PyramidConfig:
    """Depth and width multipliers, and the backbone.

    Raises:
        InvalidSetting: a multiplier is not positive and finite, or leaves no channels.
    """

    depth: float
    width: float
    backbone: Backbone = "csp-darknet"

    def __post_init__(self) -> None:
        check_multipliers(self.depth, self.width, narrowest=16)


@dataclass(frozen=True)
class GuidedConfig(PyramidConfig):
    """What the paper's ablations and its own contradictions leave to choose.

    `fuse`: guidance multiplies the next level ("star") or is added to it. `residual`: guidance is added once more at
    the end. `qk`: the projections of the equations, shared by all channels ("eq"), or those that the paper's parameter
    formula counts ("per_channel"). `norm`: batch normalisation after the convolutions of the attention module, an
    addition: the paper lists none and its formula counts none.
    """

    fuse: Fuse = "star"
    residual: bool = True
    qk: QueryKey = "eq"
    norm: Norm = "bn"


def split_in_three(channels: int) -> tuple[int, int, int]:
    """Return three widths that add up to `channels`, the first taking what does not divide."""
    third = channels // 3
    return channels - 2 * third, third, third


class LocalSpatialAttention(nn.Module):
    """LSAM, section 2.2.1: three groups of channels see 3, 5 and 7 pixels, at half the resolution."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.widths = split_in_three(channels)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride=2, padding=rate, dilation=rate, groups=width, bias=False),
                *_norm(norm, width),
                nn.Conv2d(width, width, 1, bias=False),
                *_norm(norm, width),
                nn.ReLU(),
            )
            for rate, width in enumerate(self.widths, start=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, ceil(h / 2), ceil(w / 2))."""
        parts = x.split(self.widths, dim=1)
        return torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], dim=1)


class FullChannelFusion(nn.Module):
    """FCCFM, section 2.2.1: every channel becomes a mixture of all, by attention between global descriptors.

    Differs from the paper: the mixture sums A[c, j] X_j, not A[c, j] X_c as printed, because rows of A add to 1 and
    would leave X as it is. With `qk="eq"` a channel's mean and maximum share two projections of 2 x d, as the
    equations say; with "per_channel" each channel has its own d query weights for its mean and key weights for its
    maximum, the reading of "C_in x d parameters each" under which A is still C x C. The paper's total of (9 + 3 d) C
    counts one projection more than its own components, (9 + 2 d) C.
    """

    def __init__(self, channels: int, out_channels: int, qk: QueryKey, norm: Norm) -> None:
        super().__init__()
        self.qk = qk
        shape = (DESCRIPTOR_CHANNELS, 2) if qk == "eq" else (channels, DESCRIPTOR_CHANNELS)
        self.query = nn.Parameter(torch.empty(shape))
        self.key = nn.Parameter(torch.empty(shape))
        for weight in (self.query, self.key):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.output = nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), *_norm(norm, out_channels))

    def attention(self, x: Tensor) -> Tensor:
        """Return A (B, C, C), whose rows add to 1, of maps (B, C, h, w)."""
        mean, largest = x.mean((2, 3)), x.amax((2, 3))
        if self.qk == "eq":
            descriptors = torch.stack((mean, largest), dim=2)
            query, key = descriptors @ self.query.t(), descriptors @ self.key.t()
        else:
            query, key = mean.unsqueeze(2) * self.query, largest.unsqueeze(2) * self.key
        return (query @ key.transpose(1, 2) / math.sqrt(DESCRIPTOR_CHANNELS)).softmax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the guidance map (B, C', h, w), before any sigmoid."""
        with without_autocast(x.device):
            attention = self.attention(x.to(self.query.dtype))
        mixed = (attention.to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])
        guidance: Tensor = self.output(mixed.contiguous(memory_format=torch.channels_last))
        return guidance


class PyramidalAttention(nn.Sequential):
    """LPAM: LSAM, then FCCFM. (B, C, h, w) to guidance (B, C', ceil(h / 2), ceil(w / 2)) for the next level.

    Differs from the paper, where "LSAM" and "LPAM" change places in section 2.2.3: only the whole module's output has
    the next level's width, so only it can be multiplied with that level and added to it.
    """

    def __init__(self, channels: int, out_channels: int, qk: QueryKey, norm: Norm) -> None:
        super().__init__(LocalSpatialAttention(channels, norm), FullChannelFusion(channels, out_channels, qk, norm))


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    return [batch_norm(channels)] if norm == "bn" else []


class GuidedFPN(nn.Module):
    """GF-FPN, section 2.2.3: a top-down path to F_i, and guidance from each fused level to the next coarser one.

    P_{i+1} = sigmoid(G_i) * F_{i+1} + G_i with G_i = LPAM(F_i); the coarsest F is the backbone's own map.

    Differs from the paper, which once says that guidance runs "layer-by-layer" from the level before: G_i is made
    from F_i, not from P_i, because F2, F3 and F4 are listed as what the module acts on.
    """

    def __init__(self, channels: Sequence[int], num_blocks: int, config: GuidedConfig) -> None:
        super().__init__()
        self.out_channels = tuple(channels[1:])
        self.fuse = config.fuse
        self.residual = config.residual
        self.top_down = TopDownPath(channels, num_blocks)
        self.guides = nn.ModuleList(
            PyramidalAttention(fine, coarse, config.qk, config.norm) for fine, coarse in itertools.pairwise(channels)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map per level but the finest, with the size and width of its input."""
        fused = [*self.top_down(features)[0], features[-1]]
        return [
            self.guided(guide(fine), coarse)
            for guide, (fine, coarse) in zip(self.guides, itertools.pairwise(fused), strict=True)
        ]

    def guided(self, guidance: Tensor, x: Tensor) -> Tensor:
        """Return P_{i+1} from guidance and F_{i+1}, both (B, C, h, w)."""
        gate = guidance.sigmoid()
        y = gate * x if self.fuse == "star" else gate + x
        return y + guidance if self.residual else y


def build_fpn(config: PyramidConfig, num_classes: int) -> Yolox:
    """Return the baseline without a bottom-up path. It ends at stride 8: a finer map would reach no head."""
    backbone = _backbone(config)
    return _around(backbone, FPN(backbone.out_channels[1:], _num_blocks(config)), config, num_classes)


def build_panet(config: PyramidConfig, num_classes: int) -> Yolox:
    """Return the baseline with a bottom-up path of convolutions, from stride 4 on."""
    backbone = _backbone(config)
    return _around(backbone, PAFPN(backbone.out_channels, _num_blocks(config)), config, num_classes)


def build_bifpn(config: PyramidConfig, num_classes: int) -> Yolox:
    """Return the baseline with weighted sums in both directions, over maps of one width."""
    backbone = _backbone(config)
    neck = BiFPN(backbone.out_channels, int(256 * config.width), BIFPN_LAYERS)
    return _around(backbone, neck, config, num_classes)


def build_afpn(config: PyramidConfig, num_classes: int) -> Yolox:
    """Return the baseline that fuses fine levels first."""
    backbone = _backbone(config)
    return _around(backbone, AFPN(backbone.out_channels, _num_blocks(config)), config, num_classes)


def build_gf_fpn(config: GuidedConfig, num_classes: int) -> Yolox:
    """Return an initialised GF-FPN."""
    backbone = _backbone(config)
    neck = GuidedFPN(backbone.out_channels, _num_blocks(config), config)
    return _around(backbone, neck, config, num_classes)


def _backbone(config: PyramidConfig) -> Darknet53 | CSPDarknet:
    return (Darknet53 if config.backbone == "darknet53" else CSPDarknet)(config.depth, config.width)


def _num_blocks(config: PyramidConfig) -> int:
    return scaled_repeats(3, config.depth)


def _around(
    backbone: nn.Module, neck: FPN | PAFPN | BiFPN | AFPN | GuidedFPN, config: PyramidConfig, num_classes: int
) -> Yolox:
    """Return a detector of that neck.

    The paper takes its loss from a work that is not to be had; here it is the loss of YOLOX with CIoU for the boxes.
    """
    head = DecoupledHead(neck.out_channels[-len(STRIDES) :], STRIDES, int(256 * config.width), num_classes)
    return Yolox(backbone, neck, head, SimOTA("center", 1.5), complete_iou_loss)


PYRAMID_SIZES = (
    *(Architecture(f"fpn-{size}", PyramidConfig(*MULTIPLIERS[size]), build_fpn) for size in "nsml"),
    *(Architecture(f"panet-{size}", PyramidConfig(*MULTIPLIERS[size]), build_panet) for size in "nsml"),
    *(Architecture(f"gf-fpn-{size}", GuidedConfig(*MULTIPLIERS[size]), build_gf_fpn) for size in "nsml"),
    Architecture("bifpn-l", PyramidConfig(*MULTIPLIERS["l"]), build_bifpn),
    Architecture("afpn-l", PyramidConfig(*MULTIPLIERS["l"]), build_afpn),
    Architecture("fpn-l-darknet53", PyramidConfig(*MULTIPLIERS["l"], backbone="darknet53"), build_fpn),
    Architecture("panet-l-darknet53", PyramidConfig(*MULTIPLIERS["l"], backbone="darknet53"), build_panet),
    Architecture("gf-fpn-l-darknet53", GuidedConfig(*MULTIPLIERS["l"], backbone="darknet53"), build_gf_fpn),
)

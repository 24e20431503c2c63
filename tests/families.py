"""The smallest of every family of architectures, and of those with one size a smaller one still; what they predict."""

from __future__ import annotations

import dataclasses

import torch

SMALLEST: dict[str, dict[str, float]] = {
    **{name: {} for name in ("yolox-nano", "yolox-n-p2", "yolov8-n", "yolov8-n-p2", "csf-net-n")},
    **{name: {} for name in ("fpn-n", "panet-n", "gf-fpn-n", "foreground-probe-n")},
    **{name: {"depth": 0.33, "width": 0.25} for name in ("bifpn-l", "afpn-l", "gf-fpn-l-darknet53")},
}


def tensors(predictions: object) -> dict[str, torch.Tensor]:
    """All raw predictions that are numbers, not indices, also those of predictions within predictions."""
    found: dict[str, torch.Tensor] = {}
    for name, value in vars(predictions).items():
        if dataclasses.is_dataclass(value):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()}
        elif value.is_floating_point():
            found[name] = value
    return found

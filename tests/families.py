"""The smallest of every family of architectures, and of those with one size a smaller one still."""

from __future__ import annotations

SMALLEST: dict[str, dict[str, float]] = {
    **{name: {} for name in ("yolox-nano", "yolox-n-p2", "yolov8-n", "yolov8-n-p2", "csf-net-n")},
    **{name: {} for name in ("fpn-n", "panet-n", "gf-fpn-n", "foreground-probe-n")},
    **{name: {"depth": 0.33, "width": 0.25} for name in ("bifpn-l", "afpn-l", "gf-fpn-l-darknet53")},
}

"""The table of architectures: what each has and costs here, beside what its paper says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import models

INPUT_SIZE_PX = 640


@dataclass(frozen=True)
class Published:
    """Millions of parameters and GFLOPs (two per multiply-add) as their authors give them."""

    parameters_m: float
    gflops: float
    source: str
    size_px: int = INPUT_SIZE_PX


# With so many classes the published figures were taken, and ours are.
NUM_CLASSES = {"yolox": 80, "yolov8": 80, "csf-net": 1, "foreground-probe": 10}
NUM_CLASSES_OF_PYRAMIDS = 9
_YOLOX, _YOLOV8, _GF_FPN = "YOLOX, table 3", "YOLOv8's model page", "GF-FPN, table 5"
PUBLISHED = {
    "yolox-nano": Published(0.91, 1.08, _YOLOX, size_px=416),
    "yolox-tiny": Published(5.06, 6.45, _YOLOX, size_px=416),
    "yolox-s": Published(9.0, 26.8, _YOLOX),
    "yolox-m": Published(25.3, 73.8, _YOLOX),
    "yolox-l": Published(54.2, 155.6, _YOLOX),
    "yolox-x": Published(99.1, 281.9, _YOLOX),
    "yolov8-n": Published(3.2, 8.7, _YOLOV8),
    "yolov8-s": Published(11.2, 28.6, _YOLOV8),
    "yolov8-m": Published(25.9, 78.9, _YOLOV8),
    "yolov8-l": Published(43.7, 165.2, _YOLOV8),
    "yolov8-x": Published(68.2, 257.8, _YOLOV8),
    "fpn-l": Published(40.7, 158.4, _GF_FPN),
    "panet-l": Published(46.2, 182.6, _GF_FPN),
    "bifpn-l": Published(46.8, 188.3, _GF_FPN),
    "afpn-l": Published(58.5, 224.8, _GF_FPN),
    "gf-fpn-l": Published(41.7, 166.9, _GF_FPN),
}


@dataclass(frozen=True)
class ArchitectureRow:
    """One architecture: weights and, at 640 px, floating-point operations."""

    name: str
    strides: tuple[int, ...]
    num_classes: int
    num_parameters: int
    gflops: float
    published: Published | None


def describe(name: str) -> ArchitectureRow:
    """Count one architecture, without allocating its weights."""
    family = next((family for family in NUM_CLASSES if name.startswith(family)), None)
    num_classes = NUM_CLASSES_OF_PYRAMIDS if family is None else NUM_CLASSES[family]
    with torch.device("meta"):
        detector = models.build(name, num_classes=num_classes)
        assert isinstance(detector, torch.nn.Module)
        detector.eval()
        with FlopCounterMode(display=False) as counter:
            detector(torch.empty(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX))
        num_parameters = sum(parameter.numel() for parameter in detector.parameters())
    gflops = counter.get_total_flops() / 1e9
    return ArchitectureRow(name, detector.strides, num_classes, num_parameters, gflops, PUBLISHED.get(name))


def as_markdown(rows: list[ArchitectureRow]) -> str:
    """A Markdown table."""
    header = ["architecture", "strides", "classes", "parameters", "GFLOPs", "published", "source"]
    lines = [header, ["---", "---", "--:", "--:", "--:", "---", "---"]]
    for row in rows:
        published, source = "-", "-"
        if row.published is not None:
            published = f"{row.published.parameters_m} M, {row.published.gflops} G"
            if row.published.size_px != INPUT_SIZE_PX:
                published += f" at {row.published.size_px} px"
            source = row.published.source
        strides = f"{row.strides[0]}-{row.strides[-1]}"
        counted = [str(row.num_classes), f"{row.num_parameters:,}", f"{row.gflops:.2f}"]
        lines.append([row.name, strides, *counted, published, source])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

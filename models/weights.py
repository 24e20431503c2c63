"""Weights by name: which tensor of a file is which of a detector's, across architectures and projects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# The release checkpoints of YOLOX (Megvii, Apache-2.0) by their own names, to the names used here.
_PUBLIC_YOLOX = (
    (r"^backbone\.backbone\.stem\.conv\.", "backbone.stem.block."),
    (r"^backbone\.backbone\.dark2\.", "backbone.stages.0."),
    (r"^backbone\.backbone\.dark3\.", "backbone.stages.1."),
    (r"^backbone\.backbone\.dark4\.", "backbone.stages.2."),
    (r"^backbone\.backbone\.dark5\.", "backbone.stages.3."),
    (r"^backbone\.lateral_conv0\.", "neck.top_down.laterals.1."),
    (r"^backbone\.reduce_conv1\.", "neck.top_down.laterals.0."),
    (r"^backbone\.C3_p4\.", "neck.top_down.layers.1."),
    (r"^backbone\.C3_p3\.", "neck.top_down.layers.0."),
    (r"^backbone\.bu_conv2\.", "neck.downsamples.0."),
    (r"^backbone\.bu_conv1\.", "neck.downsamples.1."),
    (r"^backbone\.C3_n3\.", "neck.layers.0."),
    (r"^backbone\.C3_n4\.", "neck.layers.1."),
    (r"^head\.cls_convs\.", "head.class_towers."),
    (r"^head\.reg_convs\.", "head.box_towers."),
    (r"^head\.cls_preds\.", "head.class_predictors."),
    (r"^head\.reg_preds\.", "head.box_predictors."),
    (r"^head\.obj_preds\.", "head.objectness_predictors."),
    (r"\.m\.(\d+)\.conv1\.", r".blocks.\1.reduce."),
    (r"\.m\.(\d+)\.conv2\.", r".blocks.\1.spatial."),
    (r"^(backbone\.stages\.3\.1)\.conv1\.", r"\1.reduce."),
    (r"^(backbone\.stages\.3\.1)\.conv2\.", r"\1.merge."),
    (r"\.conv1\.", ".main."),
    (r"\.conv2\.", ".bypass."),
    (r"\.conv3\.", ".merge."),
    (r"\.dconv\.", ".0."),
    (r"\.pconv\.", ".1."),
    (r"\.bn\.", ".norm."),
)
# Parts that a detector has once a level, the finest first.
_BY_LEVEL = re.compile(r"^(neck\.(?:top_down\.)?[a-z_]+|head\.[a-z_]+)\.(\d+)\.")


def is_public_yolox(names: Iterable[str]) -> bool:
    """Return whether tensors bear the names of a YOLOX release checkpoint."""
    return any(name.startswith("backbone.backbone.dark2.") for name in names)


def from_public_yolox(name: str) -> str:
    """Return the name here of a tensor of a YOLOX release checkpoint."""
    for pattern, replacement in _PUBLIC_YOLOX:
        name = re.sub(pattern, replacement, name)
    return name


def sources(known: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return for each tensor of a detector the given tensor to take it from, where one of equal shape exists.

    Both map names to shapes. Where one detector has more levels than the other, the coarsest levels correspond: a
    stride takes from the same stride. Foreground probing and the detector underneath it take from each other, and so
    do CSF-Net's deep backbone and YOLOv8's.
    """
    plain = {_plain(name): name for name in given}
    levels, given_levels = _num_levels(map(_plain, known)), _num_levels(plain)
    found = {}
    for name, shape in known.items():
        counterpart = _plain(name)
        if match := _BY_LEVEL.match(counterpart):
            level = int(match[2]) + given_levels.get(match[1], 0) - levels[match[1]]
            counterpart = f"{match[1]}.{level}.{counterpart[match.end() :]}"
        if counterpart in plain and given[plain[counterpart]] == shape:
            found[name] = plain[counterpart]
    return found


def _plain(name: str) -> str:
    return name.removeprefix("base.").replace("backbone.deep.", "backbone.", 1)


def _num_levels(names: Iterable[str]) -> dict[str, int]:
    """Return how many levels each part has."""
    counts: dict[str, int] = {}
    for match in filter(None, map(_BY_LEVEL.match, names)):
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts

"""What is known of public datasets before anybody imports them: `data/known/<name>.yaml`, found by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from data.records import Split
from data.splits import SplitRule

KNOWN = Path(__file__).parent / "known"


class Counts(BaseModel):
    """How many images and boxes there should be; None where no source says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int | None = None
    boxes: int | None = None


class KnownCard(BaseModel):
    """The keys of a `DatasetCard` that do not depend on whose copy it is, and the `expected` counts.

    Boxes are counted as in the files: with those that preparation leaves out for having no area or being repetitions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    licence: str
    sources: tuple[str, ...]
    classes: tuple[str, ...]
    protocol: Literal["coco", "voc", "visdrone", "uavdt", "aitod"]
    ignore_rule: Literal["none", "covered-half"]
    splits: SplitRule
    expected: dict[Literal["train", "val", "test", "total"], Counts] = Field(default_factory=dict)


def known_names() -> list[str]:
    """Names of all known datasets, sorted."""
    return sorted(path.stem for path in KNOWN.glob("*.yaml"))


def find_known(name: str) -> KnownCard | None:
    """Return what is known of the dataset of this name, or None."""
    if name not in known_names():
        return None
    return KnownCard.model_validate(yaml.safe_load((KNOWN / f"{name}.yaml").read_text(encoding="utf-8")))


def count(content: Split) -> Counts:
    """Count the images of a split, and its boxes as in the files."""
    boxes = sum(len(image.boxes) for image in content.images) + content.num_boxes_excluded
    return Counts(images=len(content.images), boxes=boxes)


def differences(known: KnownCard, splits: Mapping[str, Split]) -> list[str]:
    """Return one `where: expected, found` for every count that is not the expected one."""
    by_split = {split: count(content) for split, content in splits.items()}
    found = {
        **by_split,
        "total": Counts(
            images=sum(counts.images or 0 for counts in by_split.values()),
            boxes=sum(counts.boxes or 0 for counts in by_split.values()),
        ),
    }
    return [
        f"{where}: expected {wanted} {what}, found {number}"
        for where, counts in known.expected.items()
        for what, wanted in counts
        if wanted is not None and wanted != (number := getattr(found[where], what))
    ]

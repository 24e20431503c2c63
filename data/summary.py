"""`summaries`: one line about every dataset in the catalogue."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data.card import card_names
from data.coco_layout import annotation_file
from data.records import SPLITS
from data.samples.scene import load_recipe
from data.versioning import current_version


@dataclass(frozen=True)
class DatasetSummary:
    """What is known of a dataset without running anything.

    `version` and `size_bytes` are None until it has been versioned. While its prepared files are not in the working
    tree, the box counts are None, and `num_images` (by split) is empty, but for a rendered dataset. `num_boxes_clipped`
    stuck out of their image, `num_boxes_excluded` had no area inside it or repeated another. `remote` says whether the
    DVC remote has the version, None where nobody asked.
    """

    name: str
    version: str | None
    num_images: dict[str, int]
    num_boxes: int | None
    size_bytes: int | None
    num_boxes_clipped: int | None = None
    num_boxes_excluded: int | None = None
    remote: str | None = None


def summaries(repo: Path) -> list[DatasetSummary]:
    """Summarise every card's dataset by name, from dvc.lock and the prepared annotation files."""
    return [summarise(name, repo) for name in card_names(repo / "data" / "catalog")]


def summarise(name: str, repo: Path) -> DatasetSummary:
    """Summarise one dataset."""
    version = current_version(name, repo)
    prepared = repo / "data" / "processed" / name
    if version is None:
        return DatasetSummary(name, None, {}, None, None)
    if not prepared.is_dir():
        raw = repo / "data" / "raw" / name
        num_images = dict(load_recipe(raw).num_images) if (raw / "recipe.yaml").is_file() else {}
        return DatasetSummary(name, version.version, num_images, None, version.size_bytes)  # type: ignore[arg-type]
    documents = {split: json.loads(annotation_file(prepared, split).read_bytes()) for split in SPLITS}
    return DatasetSummary(
        name=name,
        version=version.version,
        num_images={split: len(document["images"]) for split, document in documents.items()},
        num_boxes=sum(len(document["annotations"]) for document in documents.values()),
        size_bytes=version.size_bytes,
        num_boxes_clipped=sum(document["info"]["num_boxes_clipped"] for document in documents.values()),
        num_boxes_excluded=sum(document["info"]["num_boxes_excluded"] for document in documents.values()),
    )

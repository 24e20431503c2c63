from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

Document = dict[str, Any]
Edit = Callable[[str, Document], None]


def document(split: str) -> Document:
    """A small COCO file: two 60x40 px images, four boxes, category ids that are not 1..C."""
    return {
        "images": [
            {"id": 7, "file_name": f"{split}/b.png", "width": 60, "height": 40},
            {"id": 3, "file_name": f"{split}/a.png", "width": 60, "height": 40, "ignore_regions_xywh": [[0, 0, 9, 5]]},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 20, "bbox": [10, 5, 8, 6], "area": 30.0, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 10, "bbox": [1.25, 2.5, 10, 4], "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 10, "bbox": [30, 20, 20, 15], "area": 250.0, "iscrowd": 1},
            {"id": 4, "image_id": 3, "category_id": 20, "bbox": [40, 20, 3, 3], "area": 9.0},
        ],
        "categories": [{"id": 20, "name": "boat"}, {"id": 10, "name": "car"}],
    }


@pytest.fixture
def coco_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a COCO folder; `edit(split, document)` may spoil a split's document first."""

    def write(edit: Edit | None = None, name: str = "source") -> Path:
        folder = tmp_path / name
        (folder / "annotations").mkdir(parents=True)
        for number, split in enumerate(("train", "val", "test")):
            (folder / "images" / split).mkdir(parents=True)
            for offset, letter in enumerate("ab"):
                image = np.random.default_rng((number, offset)).integers(0, 256, (40, 60, 3), np.uint8)
                cv2.imwrite(str(folder / "images" / split / f"{letter}.png"), image)
            content = document(split)
            if edit is not None:
                edit(split, content)
            (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture
def make_repo(tmp_path: Path) -> Callable[..., Path]:
    """A repository skeleton whose dataset `tiny` lies in `source`."""

    def make(source: Path | None = None, classes: tuple[str, ...] = ("car", "boat"), **card: Any) -> Path:
        repo = tmp_path / "repo"
        (repo / "data" / "catalog").mkdir(parents=True)
        (repo / "data" / "raw").mkdir()
        (repo / "params.yaml").write_text("# which datasets\ndatasets:\n  - alpha # first\n  - zulu\nother: 1\n")
        if source is not None:
            (repo / "data" / "raw" / "tiny").symlink_to(source)
            values = {"name": "tiny", "description": "d", "licence": "l", "format": "coco", "source": "s"}
            values |= {"classes": list(classes)} | card
            (repo / "data" / "catalog" / "tiny.yaml").write_text(yaml.safe_dump(values))
        return repo

    return make


@pytest.fixture(scope="session")
def paint() -> Callable[..., Path]:
    """Writes a picture of noise, no two paths alike, and returns its path."""

    def write(path: Path, width_px: int = 60, height_px: int = 40) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(list(path.as_posix().encode())).integers(
            0, 256, (height_px, width_px, 3), np.uint8
        )
        cv2.imwrite(str(path), noise)
        return path

    return write

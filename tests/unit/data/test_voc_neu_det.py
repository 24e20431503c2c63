"""The Pascal VOC reader on NEU-DET, 1,800 pictures of real labels; skipped where they are not at hand."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.importing import register
from data.prepare import prepare
from data.records import SPLITS

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
NEU_DET = SHARED / "neu_det"
# As published, with the three boxes that its files hold twice.
BOXES_BY_CLASS = {
    "crazing": 689, "inclusion": 1011, "patches": 881, "pitted_surface": 432, "rolled-in_scale": 628, "scratches": 548,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The three prepared annotation files."""
    if not NEU_DET.is_dir():
        pytest.skip(f"needs NEU-DET in {NEU_DET}: set SPECK_SHARED_DATASETS")
    repo = tmp_path_factory.mktemp("repo")
    (repo / "data/catalog").mkdir(parents=True)
    (repo / "data/raw").mkdir()
    (repo / "params.yaml").write_text("datasets: []\n")
    card = register("neu-det", NEU_DET, repo=repo, licence="research").card
    assert card.classes == tuple(BOXES_BY_CLASS)
    folder = prepare("neu-det", repo)
    return {split: json.loads((folder / f"annotations/{split}.json").read_bytes()) for split in SPLITS}


def rows(prepared: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for document in prepared.values() for row in document["annotations"]]


def test_counts_are_the_published_ones(prepared: dict[str, dict[str, Any]]) -> None:
    assert [len(prepared[split]["images"]) for split in SPLITS] == [1440, 180, 180]
    assert len(rows(prepared)) == 4189 - 3
    assert [document["info"]["num_boxes_clipped"] for document in prepared.values()] == [0, 0, 0]
    assert sum(document["info"]["num_boxes_excluded"] for document in prepared.values()) == 3
    names = list(BOXES_BY_CLASS)
    found = Counter(names[row["category_id"] - 1] for row in rows(prepared))
    assert Counter(BOXES_BY_CLASS) - found == Counter(crazing=1, inclusion=1, patches=1)
    assert sum(row["iscrowd"] for row in rows(prepared)) == 81


def test_boxes_are_those_of_the_files(prepared: dict[str, dict[str, Any]]) -> None:
    """447 boxes are smaller than 32x32 by corner differences; with both ends included each side is 1 px longer."""
    expected: Counter[Any] = Counter()
    for path in (NEU_DET / "annotations").iterdir():
        for item in ET.parse(path).getroot().iter("object"):
            corners = [int(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
            expected[path.stem, item.findtext("name"), *corners] += 1
    found: Counter[Any] = Counter()
    for document in prepared.values():
        stems = {row["id"]: Path(row["file_name"]).stem for row in document["images"]}
        names = {row["id"]: row["name"] for row in document["categories"]}
        for row in document["annotations"]:
            x, y, w, h = row["bbox"]
            found[stems[row["image_id"]], names[row["category_id"]], x + 1, y + 1, x + w, y + h] += 1
    assert set(found) == set(expected)
    assert set(found.values()) == {1}
    assert sum(count - 1 for count in expected.values()) == 3
    assert sum((x2 - x1) * (y2 - y1) < 32**2 for _, _, x1, y1, x2, y2 in expected.elements()) == 447
    assert sum(row["area"] < 32**2 for row in rows(prepared)) == 397

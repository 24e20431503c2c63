"""Readers on real labels; skipped where they are not at hand. VisDrone's come without pictures: see the test."""

from __future__ import annotations

import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from data.cleaning import ImageBoxes
from data.dividing import VIDEO
from data.importing import register
from data.known_cards import find_known
from data.prepare import prepare
from data.reading import read_labels
from data.records import SPLITS, Split
from data.splits import SplitRule
from data.visdrone import CLASSES, read_annotations

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))


def needs(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {name} in {SHARED}: set SPECK_SHARED_DATASETS")
    return SHARED / name


def repository(folder: Path) -> Path:
    (folder / "data/catalog").mkdir(parents=True)
    (folder / "data/raw").mkdir()
    (folder / "params.yaml").write_text("datasets: []\n")
    return folder


def test_aerial_cars(tmp_path: Path) -> None:
    """36 pictures, 697 boxes; no box sticks out by exact arithmetic on the files' decimals."""
    source, repo = needs("aerial_cars"), repository(tmp_path)
    card, notes = register("aerial-cars", source, repo=repo)
    assert (card.format, card.splits.rule, card.splits.sequence) == ("yolo", "by-sequence", VIDEO)
    assert notes[0] == "yolo: aerial.names names 5 classes and 36 pictures have a label file"
    chosen = read_labels("yolo", source, card.classes, card.splits)
    videos = {(image.file_name[:8], split) for split, part in chosen.splits.items() for image in part.images}
    assert (len(videos), {split for _, split in videos}) == (4, {*SPLITS}), "no video is in two splits"
    assert sum(len(image.boxes) for part in chosen.splits.values() for image in part.images) == 697
    rule = SplitRule(
        rule="by-sequence",
        sequence="^(DJI.[0-9]+)-",
        pinned={"train": ("DJI-00760", "DJI_0005"), "val": ("DJI_0013",), "test": ("DJI_0762",)},
    )
    card_file = repo / "data/catalog/aerial-cars.yaml"
    card_file.write_text(card.model_copy(update={"splits": rule}).model_dump_json(exclude_none=True))
    prepared = prepare("aerial-cars", repo)
    documents = {split: json.loads((prepared / f"annotations/{split}.json").read_bytes()) for split in SPLITS}
    assert [len(document["images"]) for document in documents.values()] == [24, 4, 8]
    found = Counter(
        card.classes[row["category_id"] - 1] for document in documents.values() for row in document["annotations"]
    )
    assert found == {"car": 585, "truck": 5, "bus": 52, "minibus": 55}
    assert sum(found.values()) == 697
    assert all(document["info"]["num_boxes_excluded"] == 0 for document in documents.values())
    rows = [line.split() for path in source.glob("DJI*.txt") for line in path.read_text().splitlines()]
    assert len(rows) == 697
    for _, *numbers in rows:
        cx, cy, w, h = (Fraction(number) for number in numbers)
        assert min(cx - w / 2, cy - h / 2) >= 0
        assert max(cx + w / 2, cy + h / 2) <= 1
    assert all(document["info"]["num_boxes_clipped"] == 0 for document in documents.values())


def test_visdrone_val_annotations() -> None:
    """The annotation reader alone, with sizes from a table: there are no pictures to import."""
    source = needs("visdrone_val")
    sizes = json.loads((source / "image_sizes.json").read_bytes())
    content, rows, records = Split(), Counter[int](), []
    for path in sorted((source / "annotations").glob("*.txt")):
        boxes = ImageBoxes(content, *sizes[path.stem])
        rows += read_annotations(path, CLASSES, boxes)
        records.append(boxes.record(0, path.stem))
    known = find_known("visdrone")
    assert known is not None
    assert known.expected["val"].model_dump() == {"images": len(records), "boxes": 38_759}
    assert rows[0] == sum(len(record.ignore_xywh_px) for record in records) == 1378
    assert rows[11] == 32
    assert sum(rows.values()) - rows[0] - rows[11] == 38_759
    kept = [box for record in records for box in record.boxes]
    assert Counter(box.label + 1 for box in kept) + Counter({11: 32, 0: 1378}) == rows
    assert (len(kept), content.problems) == (38_759, [])
    assert round(100 * sum(box.area_px < 32**2 for box in kept) / len(kept), 1) == 68.6
    assert not any(box.is_crowd for box in kept)


def test_neu_det_is_known(tmp_path: Path) -> None:
    """Its lists hold, its counts are as published, its oddities are named: repeated boxes and a repeated picture."""
    source, repo = needs("neu_det"), repository(tmp_path)
    card, notes = register("neu-det", source, repo=repo)
    assert notes[0] == "voc: annotations/ beside images/ holds 1800 XML files"
    assert not any("not as published" in note for note in notes)
    assert card.sources
    assert card.licence == "unknown"
    labels = read_labels("voc", source, card.classes, card.splits)
    assert sum("occurs twice" in problem.rule for problem in labels.problems) == 3
    names = {image.file_name: image for content in labels.splits.values() for image in content.images}
    others = sum(
        card.classes[box.label] != name.rpartition("_")[0] for name, image in names.items() for box in image.boxes
    )
    assert others == 188, "the XML is right"
    for split in SPLITS:
        listed = (source / f"splits/{split}.txt").read_text().split()
        assert {image.file_name.rpartition(".")[0] for image in labels.splits[split].images} == set(listed)
    twins = [(source / f"images/{name}.jpg").read_bytes() for name in ("patches_101", "patches_105")]
    assert twins[0] == twins[1]
    assert names["patches_101.jpg"].boxes != names["patches_105.jpg"].boxes

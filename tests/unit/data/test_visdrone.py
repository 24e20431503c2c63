from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.importing import ImportRefused, register
from data.prepare import prepare
from data.reading import Labels, read_labels
from data.records import SPLITS
from data.splits import SplitRule
from data.visdrone import CLASSES, recognise

Make = Callable[..., Path]
FOLDERS = {"train": "VisDrone2019-DET-train", "val": "VisDrone2019-DET-val", "test": "VisDrone2019-DET-test-dev"}


@pytest.fixture
def folder(tmp_path: Path, paint: Make) -> Path:
    root = tmp_path / "source"
    for name in FOLDERS.values():
        for letter in "ab":
            paint(root / name / "images" / f"{letter}.png")
            annotation = root / name / "annotations" / f"{letter}.txt"
            annotation.parent.mkdir(exist_ok=True)
            annotation.write_text("3,4,10,8,1,4,0,0\n20,10,5,5,1,1,0,1,\n")
    return root


def read(folder: Path, rule: SplitRule | None = None) -> Labels:
    return read_labels("visdrone", folder, CLASSES, rule)


def shown(labels: Labels) -> list[str]:
    return [str(problem) for problem in labels.problems]


def test_import_and_prepare(folder: Path, make_repo: Make) -> None:
    (folder / "VisDrone2019-DET-test-challenge/images").mkdir(parents=True)
    repo = make_repo()
    card, notes = register("streets", folder, repo=repo)
    assert (card.format, card.classes, card.splits.rule) == ("visdrone", CLASSES, "given")
    assert (card.protocol, card.ignore_rule) == ("visdrone", "covered-half")
    assert notes[0].startswith(
        "visdrone: rows of 8 numbers in annotations/*.txt beside images/ in VisDrone2019-DET-test-dev"
    )
    document = json.loads((prepare("streets", repo) / "annotations/test.json").read_bytes())
    assert [row["file_name"] for row in document["images"]] == [f"{FOLDERS['test']}/images/{x}.png" for x in "ab"]
    assert [row["bbox"] for row in document["annotations"][:2]] == [[3, 4, 10, 8], [20, 10, 5, 5]]
    assert [row["category_id"] for row in document["annotations"][:2]] == [4, 1]


def test_the_oracle_of_a_loop_over_the_rows(folder: Path) -> None:
    """All kinds of rows, read by plain arithmetic on the text."""
    rows = [
        "0,0,30,20,0,0,0,0", "50,30,20,20,0,0,0,0", "5,5,4,4,0,11,0,0", "1,1,5,5,1,10,0,0", "8,8,6,7,0,3,1,2",
        "55,35,10,10,1,9,0,0", "-2,-3,6,6,1,2,0,0", "10,10,0,5,1,4,0,0", "10,10,5,-1,1,4,0,0", "1,1,5,5,1,10,1,1",
        "70,5,4,4,0,0,0,0", "6,6,2,2,1,5,0,0,",
    ]  # fmt: skip
    (folder / FOLDERS["val"] / "annotations/a.txt").write_text("\n".join(rows))
    labels = read(folder)
    content = labels.splits["val"]
    boxes, ignored = [], []
    for row in rows:
        x, y, w, h, score, category = [int(text) for text in row.split(",")[:6]]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, 60), min(y + h, 40)
        box = (x1, y1, x2 - x1, y2 - y1)
        if w <= 0 or h <= 0 or box[2] <= 0 or box[3] <= 0:
            continue
        if category == 0:
            ignored.append(box)
        elif category < 11 and (category - 1, box, score == 0) not in boxes:
            boxes.append((category - 1, box, score == 0))
    image = content.images[0]
    assert [(box.label, box.box_xywh_px, box.is_crowd) for box in image.boxes] == boxes
    assert list(image.ignore_xywh_px) == ignored
    assert (content.num_boxes_clipped, content.num_boxes_excluded) == (2, 4)
    texts = shown(labels)
    assert len(texts) == 2 + 4 + 2
    assert "1 boxes of split 'val' are of category 11 (others), neither scored nor ignored" in texts[-2]
    assert "1 boxes of split 'val' have score 0, so scoring must neither reward nor punish them" in texts[-1]


def test_all_problems_come_at_once(folder: Path) -> None:
    place = folder / FOLDERS["train"]
    path = place / "annotations/a.txt"
    path.write_text(
        "1,1,5,5,1,12,0,0\n1,1,5,5,1,4,0\n1,1,nan,5,1,4,0,0\n 1,1,5, 5.5,1,4,0,0\n1,,5,5,1,4,0,0\n1,1,1e300,5,1,4,0,0\n"
    )
    (place / "annotations/b.txt").unlink()
    (place / "annotations/c.txt").write_text("")
    (folder / FOLDERS["test"] / "images/a.png").write_bytes(b"no picture")
    assert shown(read(folder)) == [
        f"{place / 'annotations'}: warning: 1 annotation files have no picture, for example c. "
        "Left out when prepared: add the pictures",
        f"{path}:1:11: error: category 12 is none of the card's classes, 0 (ignore region) or 11 (others). "
        f"Known: {', '.join(CLASSES)}",
        f"{path}:2: error: a row has 8 fields (x,y,w,h,score,category,truncation,occlusion), found 7. Correct it",
        f"{path}:3:5: error: w must be a whole number, found 'nan'. Correct it",
        f"{path}:4:9: error: h must be a whole number, found '5.5'. Correct it",
        f"{path}:5:3: error: y must be a whole number, found ''. Correct it",
        f"{path}:6:5: error: w must be a whole number, found '1e300'. Correct it",
        f"{place / 'annotations/b.txt'}: error: the file is missing. Provide a sound annotation file",
        f"{folder / FOLDERS['test'] / 'images/a.png'}: error: not an image of type JPEG, PNG, BMP, TIFF, WEBP. "
        "Replace the file, or remove it and its labels",
    ]


def test_one_split_alone_is_divided(folder: Path) -> None:
    labels = read(folder / FOLDERS["train"])
    assert labels.divider.rule == SplitRule(rule="ratio")
    assert sum(len(labels.splits[split].images) for split in SPLITS) == 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("latest", None), ("valley-train", "train"), ("contest_val2", "val"), ("Validation", "val"), ("TEST", "test"),
        ("VisDroneTrain", "train"), ("train+test", None), ("interval", None), ("DET-valid.v1", "val"),
    ],
)  # fmt: skip
def test_a_folder_s_split_is_a_word_of_its_name(tmp_path: Path, paint: Make, name: str, split: str | None) -> None:
    paint(tmp_path / name / "images/a.png")
    (tmp_path / name / "annotations").mkdir()
    (tmp_path / name / "annotations/a.txt").write_text("3,4,10,8,1,4,0,0\n")
    labels = read(tmp_path, SplitRule())
    assert {key: len(content.images) for key, content in labels.splits.items() if content.images} == (
        {split: 1} if split is not None else {}
    )


def test_two_pictures_of_one_annotation_file(folder: Path, paint: Make) -> None:
    place = folder / FOLDERS["val"]
    paint(place / "images/a.jpg")
    assert shown(read(folder)) == [
        f"{place / 'annotations/a.txt'}: error: a.jpg, a.png share this annotation file. Keep one of these pictures"
    ]


def test_annotations_without_pictures_are_not_recognised(folder: Path) -> None:
    for name in FOLDERS.values():
        for path in (folder / name / "images").iterdir():
            path.unlink()
        (folder / name / "images").rmdir()
    assert recognise(folder) == (
        False, "no folder with annotations/*.txt beside images/, nor folders for the splits with these",
    )  # fmt: skip


def test_what_has_no_partner_is_said(folder: Path, make_repo: Make, paint: Make) -> None:
    paint(folder / "VisDrone2019-DET-test-challenge/images/a.png")
    place = folder / FOLDERS["val"]
    for path in (place / "images").iterdir():
        path.unlink()
    assert shown(read(folder)) == [
        f"{folder / 'VisDrone2019-DET-test-challenge'}: warning: 1 pictures have no annotations beside them. "
        "Left out when prepared: add annotations/",
        f"{place / 'images'}: error: the split has no images. Add the pictures",
        f"{place / 'annotations'}: warning: 2 annotation files have no picture, for example a, b. "
        "Left out when prepared: add the pictures",
    ]
    with pytest.raises(ImportRefused, match="the split has no images"):
        register("streets", folder, repo=make_repo())

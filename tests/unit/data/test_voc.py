from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.checking import check
from data.importing import ImportRefused, register
from data.prepare import prepare
from data.problems import InvalidDataset, Problem
from data.reading import read_labels
from data.records import SPLITS
from data.splits import SplitRule

Make = Callable[..., Path]
WIDTH_PX, HEIGHT_PX = 60, 40
STANDARD = ("Annotations", "JPEGImages", "ImageSets/Main")
FLAT = ("annotations", "images", "splits")


class Thing(NamedTuple):
    """One object of a picture; `corners_px`: xmin, ymin, xmax, ymax from 1, both ends included."""

    name: str
    corners_px: tuple[float, float, float, float]
    is_difficult: bool = False


SOUND: dict[str, dict[str, list[Thing]]] = {
    "train": {"b-2": [Thing("dent", (1, 1, 60, 40)), Thing("rust", (7, 8, 7, 8))], "b-1": []},
    "val": {"a": [Thing("rust", (3, 4, 12.5, 30)), Thing("dent", (3, 4, 12.5, 30), is_difficult=True)]},
    "test": {"c.v1": [Thing("chip", (11, 12, 20, 21))]},
}


def write(folder: Path, content: dict[str, dict[str, list[Thing]]] = SOUND, parts: tuple[str, ...] = FLAT) -> Path:
    """Write a VOC folder: the pictures are noise, no two alike."""
    for part in parts:
        (folder / part).mkdir(parents=True)
    for split, pictures in content.items():
        (folder / parts[2] / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in pictures))
        for stem, things in pictures.items():
            seed = list(f"{split}{stem}".encode())
            noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), np.uint8)
            cv2.imwrite(str(folder / parts[1] / f"{stem}.png"), noise)
            (folder / parts[0] / f"{stem}.xml").write_text(annotation(stem, things))
    return folder


def annotation(stem: str, things: list[Thing]) -> str:
    """One object a line, from line 3 on."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    head = f"<filename>{stem}.png</filename><size><width>{WIDTH_PX}</width><height>{HEIGHT_PX}</height></size>"
    lines = ["<annotation>", head]
    for thing in things:
        box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, thing.corners_px, strict=True))
        difficult = f"<difficult>{int(thing.is_difficult)}</difficult>"
        lines.append(f"<object><name>{thing.name}</name>{difficult}<bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>\n"])


@pytest.fixture
def make_voc_repo(make_repo: Make) -> Callable[..., Path]:
    """A repository whose dataset `tiny` is the VOC folder `source`."""
    return lambda source: make_repo(source, ("chip", "dent", "rust"), format="voc")


def expected(folder: Path, parts: tuple[str, ...]) -> Counter[Any]:
    """What the files say, read by other means."""
    rows: Counter[Any] = Counter()
    for split in SPLITS:
        for stem in (folder / parts[2] / f"{split}.txt").read_text().split():
            root = ET.parse(folder / parts[0] / f"{stem}.xml").getroot()
            for item in root.iter("object"):
                x1, y1, x2, y2 = (float(side.text or "") for side in item.find("bndbox") or ())
                box = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
                rows[split, f"{stem}.png", item.findtext("name"), box, int(item.findtext("difficult") or 0)] += 1
    return rows


def prepared(folder: Path) -> Counter[Any]:
    rows: Counter[Any] = Counter()
    for split in SPLITS:
        document = json.loads((folder / "annotations" / f"{split}.json").read_bytes())
        names = {row["id"]: row["name"] for row in document["categories"]}
        files = {row["id"]: row["file_name"] for row in document["images"]}
        for row in document["annotations"]:
            assert row["area"] == row["bbox"][2] * row["bbox"][3]
            rows[split, files[row["image_id"]], names[row["category_id"]], tuple(row["bbox"]), row["iscrowd"]] += 1
    return rows


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def files(repo: Path) -> list[Path]:
    return sorted(path for path in repo.rglob("*") if ".dvc" not in path.parts)


def by_severity(problems: list[Problem], severity: str) -> list[str]:
    return [str(problem) for problem in problems if problem.severity == severity]


@pytest.mark.parametrize("parts", [STANDARD, FLAT])
def test_imported_data_is_what_the_files_say(make_repo: Make, tmp_path: Path, parts: tuple[str, ...]) -> None:
    source, repo = write(tmp_path / "source", parts=parts), make_repo()
    card = register("plates", source, "voc", repo=repo, licence="CC0-1.0").card
    assert card.classes == ("chip", "dent", "rust"), "sorted, over all splits"
    card_text = (repo / "data/catalog/plates.yaml").read_text()
    assert (yaml.safe_load(card_text)["format"], str(source) in card_text) == ("voc", False)
    folder = prepare("plates", repo)
    assert prepared(folder) == expected(source, parts)
    assert hashes(folder / "images") == hashes(source / parts[1])
    images = [json.loads((folder / f"annotations/{split}.json").read_bytes())["images"] for split in SPLITS]
    assert [[(row["id"], row["file_name"], row["width"], row["height"]) for row in rows] for rows in images] == [
        [(1, "b-1.png", 60, 40), (2, "b-2.png", 60, 40)], [(3, "a.png", 60, 40)], [(4, "c.v1.png", 60, 40)],
    ]  # fmt: skip
    (warning,) = check("plates", repo)
    assert str(warning).endswith("val.txt: warning: 1 boxes are marked difficult, so scoring must neither reward nor "
                                 "punish them. Kept as crowd boxes when prepared")  # fmt: skip


def test_only_the_pictures_and_boxes_make_the_bytes(make_voc_repo: Make, tmp_path: Path) -> None:
    """Neither the order of a list nor extensions, line ends, blank lines and a byte order mark in it."""
    source = write(tmp_path / "source")
    repo = make_voc_repo(source)
    first = hashes(prepare("tiny", repo))
    assert hashes(prepare("tiny", repo)) == first
    (source / "splits/train.txt").write_bytes(b"\xef\xbb\xbf\r\nb-1.png\r\n\r\n b-2.PNG \r\n")
    (source / "splits/test.txt").write_text("c.v1")
    assert hashes(prepare("tiny", repo)) == first


corner = st.integers(-5, 66)


@settings(max_examples=60)
@given(st.lists(st.tuples(corner, corner, corner, corner), max_size=6))
def test_boxes_cover_the_pixels_they_name(corners: list[tuple[int, int, int, int]]) -> None:
    """The oracle paints every pixel whose 1-based column and row lie in the box, both ends included."""
    columns, rows = np.arange(1, WIDTH_PX + 1), np.arange(1, HEIGHT_PX + 1)
    boxes, num_outside, num_clipped, num_again = [], 0, 0, 0
    for x1, y1, x2, y2 in corners:
        xs, ys = columns[(columns >= x1) & (columns <= x2)], rows[(rows >= y1) & (rows <= y2)]
        if not xs.size or not ys.size:
            num_outside += 1
            continue
        box = (float(xs[0] - 1), float(ys[0] - 1), float(xs.size), float(ys.size))
        if box in boxes:
            num_again += 1
            continue
        boxes.append(box)
        num_clipped += x1 < 1 or y1 < 1 or x2 > WIDTH_PX or y2 > HEIGHT_PX
    with tempfile.TemporaryDirectory() as folder:
        things = [Thing("dent", corner) for corner in corners]
        write(Path(folder), {"train": {"a": things}, "val": {"b": []}, "test": {"c": []}})
        split = read_labels("voc", Path(folder), ["dent"], SplitRule()).splits["train"]
    assert [box.box_xywh_px for box in split.images[0].boxes] == boxes
    assert (split.num_boxes_clipped, split.num_boxes_excluded) == (num_clipped, num_outside + num_again)
    assert len(split.problems) == num_clipped + num_outside + num_again
    assert {problem.severity for problem in split.problems} <= {"warning"}


def test_a_box_twice_is_kept_once(make_voc_repo: Make, tmp_path: Path) -> None:
    dent = Thing("dent", (2, 3, 9, 9))
    source = write(tmp_path / "source", SOUND | {"train": {"b": [dent, Thing("rust", dent.corners_px), dent]}})
    repo = make_voc_repo(source)
    document = json.loads((prepare("tiny", repo) / "annotations/train.json").read_bytes())
    assert [row["category_id"] for row in document["annotations"]] == [2, 3]
    assert document["info"]["num_boxes_excluded"] == 1
    place = re.escape(str(repo / "data/raw/tiny/annotations/b.xml:5"))
    assert any(re.match(rf"{place}: warning: box .* of class 'dent' occurs twice", str(p)) for p in check("tiny", repo))


@pytest.mark.parametrize("is_wrong", [False, True])
@pytest.mark.parametrize("is_found", [False, True])
def test_difficult_objects_count_neither_way(
    make_voc_repo: Make, tmp_path: Path, is_found: bool, is_wrong: bool
) -> None:
    """pycocotools: a detection of the difficult object changes nothing; one of the background does."""
    rust, difficult = Thing("rust", (30, 4, 49, 23)), Thing("rust", (3, 4, 11.5, 29), is_difficult=True)
    source = write(tmp_path / "source", SOUND | {"test": {"c": [rust, difficult]}})
    detections = [{"image_id": 4, "category_id": 3, "bbox": [30 - 1, 3, 20, 20], "score": 0.5}]
    if is_found:
        detections.append({"image_id": 4, "category_id": 3, "bbox": [2, 3, 9.5, 26], "score": 0.9})
    if is_wrong:
        detections.append({"image_id": 4, "category_id": 3, "bbox": [45, 30, 9, 9], "score": 0.8})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(prepare("tiny", make_voc_repo(source)) / "annotations/test.json"))
        scored = COCOeval(truth, truth.loadRes(detections), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert scored.stats[0] == pytest.approx(0.5 if is_wrong else 1.0)


def test_all_problems_come_at_once(make_voc_repo: Make, tmp_path: Path) -> None:
    source = write(tmp_path / "source", SOUND | {"val": {name: [Thing("dent", (1, 1, 5, 5))] for name in "defghi"}})
    for name, old, new in (
        ("d", "<name>dent", "<name>bent"),
        ("e", "<xmin>1<", "<xmin>nan<"),
        ("f", "<difficult>0", "<difficult>yes"),
        ("g", "<width>60", "<width>0"),
        ("h", "<width>60", "<width>61"),
        ("i", "<annotation>", '<!DOCTYPE annotation [<!ENTITY a "b">]>\n<annotation>'),
        ("b-1", "b-1.png", "../../etc/passwd"),
        ("b-2", "b-2.png", "other.png"),
    ):
        replace(source / f"annotations/{name}.xml", old, new)
    (source / "annotations/c.v1.xml").unlink()
    shutil.copyfile(source / "images/d.png", source / "images/d.bmp")
    names = ["c.v1", "b-2.png", "../b-1", "/etc/passwd", "..", "images/e", "absent.png", "c.v1", "c.v1.png", "b\\1"]
    (source / "splits/test.txt").write_text("\n".join(names))
    (source / "images/h.png").write_bytes((source / "images/h.png").read_bytes()[:-100])
    (source / "images/lonely.png").write_bytes(b"")
    (source / "annotations/lonely.xml").write_bytes(b"")
    repo = make_voc_repo(source)
    with pytest.raises(InvalidDataset) as caught:
        prepare("tiny", repo)
    raw = repo / "data/raw/tiny"
    parts = [
        ("splits/test.txt:2", "'b-2.png' is listed in train.txt:1 already"),
        ("splits/test.txt:3", "'../b-1' is not the bare name of a file"),
        ("splits/test.txt:4", "'/etc/passwd' is not the bare name"),
        ("splits/test.txt:5", "'..' is not the bare name"),
        ("splits/test.txt:6", "'images/e' is not the bare name"),
        ("splits/test.txt:7", "there is no picture images/absent"),
        ("splits/test.txt:8", "'c.v1' is listed in test.txt:1 already"),
        ("splits/test.txt:9", "'c.v1.png' is listed in test.txt:1 already"),
        ("splits/test.txt:10", "'b\\\\1' is not the bare name"),
        ("splits/val.txt:1", "'d' could be any of d.bmp, d.png"),
        ("annotations/e.xml:3", "an object needs a name, four numbers"),
        ("annotations/f.xml:3", "a difficult of 0 or 1"),
        ("annotations/g.xml", "<size> must have a width and height"),
        ("annotations/i.xml", "document types and entities are not allowed"),
        ("annotations/b-1.xml", "filename '../../etc/passwd' leaves the images folder"),
        ("annotations/c.v1.xml", "the file is missing"),
        ("images/h.png", "the image is 60x40 px, its record says 61x40"),
    ]
    errors = by_severity(list(caught.value.problems), "error")
    for place, rule in parts:
        assert any(text.startswith(f"{raw / place}: error: ") and rule in text for text in errors), (place, rule)
    assert len(errors) == len(parts)
    warnings = by_severity(list(caught.value.problems), "warning")
    assert [text.partition(": warning: ")[2] for text in warnings] == [
        "1 pictures are in no split, for example lonely.png. Left out when prepared: list them to use them",
        "2 files are of no picture in a split, for example d, lonely. "
        "Left out when prepared: add or list the pictures to use them",
        "filename 'other.png' is not that of the picture 'b-2', which the list names. "
        "The list decides: see that these are its boxes",
    ]
    assert not (repo / "data/processed/tiny").exists()
    assert [str(problem) for problem in check("tiny", repo)] == [str(problem) for problem in caught.value.problems]


def test_a_class_that_the_card_lacks(make_voc_repo: Make, tmp_path: Path) -> None:
    repo = make_voc_repo(write(tmp_path / "source", SOUND | {"val": {"a": [Thing("bent", (1, 1, 5, 5))]}}))
    with pytest.raises(InvalidDataset, match=r"a\.xml:3: error: 'bent' is not one of the card's .* chip, dent, rust"):
        prepare("tiny", repo)


def test_a_lacking_list_is_made_up_for(make_repo: Make, tmp_path: Path) -> None:
    """The pictures that it held are divided by their content, the other lists hold; the card says so."""
    source, repo = write(tmp_path / "source", parts=STANDARD), make_repo()
    (source / "ImageSets/Main/val.txt").unlink()
    card, notes = register("plates", source, "voc", repo=repo, licence="l")
    assert (card.splits.rule, card.classes) == ("ratio", ("chip", "dent", "rust"))
    assert any("by the rule 'ratio'" in note for note in notes)
    splits = read_labels("voc", source, card.classes, card.splits).splits
    assert [image.file_name for image in splits["test"].images] == ["c.v1.png"]
    assert sum(len(content.images) for content in splits.values()) == 4
    problems = read_labels("voc", source, card.classes, SplitRule()).divider.problems
    assert [problem.severity for problem in problems] == ["error", "warning"]
    assert "no split 'val': training needs train, selection val" in str(problems[0])


def test_folders_without_pictures_are_refused(make_repo: Make, tmp_path: Path) -> None:
    source, repo = write(tmp_path / "source", parts=STANDARD), make_repo()
    before = files(repo)
    shutil.rmtree(source / "JPEGImages")
    with pytest.raises(ImportRefused, match=r"JPEGImages: error: a VOC folder holds pictures"):
        register("plates", source, "voc", repo=repo, licence="l")
    assert files(repo) == before


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("splits/val.txt", b"\n \n", r"val\.txt: error: the split has no images"),
        ("splits/val.txt", b"\xff\xfe\x00", r"val\.txt: error: not a text file in UTF-8"),
        ("annotations/a.xml", b"<annotation>", r"a\.xml:1:13: error: not XML"),
    ],
)
def test_unsound_folders_are_refused(make_repo: Make, tmp_path: Path, name: str, content: bytes, rule: str) -> None:
    source, repo = write(tmp_path / "source"), make_repo()
    (source / name).write_bytes(content)
    before = files(repo)
    with pytest.raises(ImportRefused, match=rule):
        register("plates", source, "voc", repo=repo, licence="l")
    assert files(repo) == before


def test_data_without_any_object_is_refused(make_repo: Make, tmp_path: Path) -> None:
    source = write(tmp_path / "source", {split: {split: []} for split in SPLITS})
    with pytest.raises(ImportRefused, match="holds an object, so there is no class"):
        register("plates", source, "voc", repo=make_repo(), licence="l")

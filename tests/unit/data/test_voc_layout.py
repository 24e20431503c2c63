"""The folders in which the files of a VOC dataset may lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.importing import register
from data.prepare import prepare
from data.reading import Labels, read_labels
from data.records import SPLITS
from data.splits import SplitRule
from data.voc import class_names, recognise, voc_folder

Make = Callable[..., Path]
SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
NEU_DET = SHARED / "neu_det"
BY_RATIO = SplitRule(rule="ratio", near_duplicates="keep")
STEMS = [f"dent_{number}" for number in range(1, 5)]


def write(paint: Make, picture: Path, xml: Path, xmin: int = 3) -> None:
    """One picture of 60x40 px and its XML, which has the base name and a box of 10x8 px at (xmin - 1, 3)."""
    paint(picture)
    xml.parent.mkdir(parents=True, exist_ok=True)
    box = f"<xmin>{xmin}</xmin><ymin>4</ymin><xmax>{xmin + 9}</xmax><ymax>11</ymax>"
    xml.write_text(
        f"<annotation><filename>{picture.name}</filename><size><width>60</width><height>40</height></size>"
        f"<object><name>dent</name><bndbox>{box}</bndbox></object></annotation>\n"
    )


def read(folder: Path, rule: SplitRule | None = BY_RATIO) -> Labels:
    return read_labels("voc", folder, ("dent",), rule)


def names(labels: Labels) -> set[str]:
    return {image.file_name for content in labels.splits.values() for image in content.images}


def shown(labels: Labels, severity: str) -> list[str]:
    return [str(problem) for problem in labels.problems if problem.severity == severity]


@pytest.mark.parametrize(
    ("annotations", "images", "xml", "picture"),
    [
        ("ANNOTATIONS", "IMAGES", ".xml", ".png"),
        ("Annotations", "Images", ".XML", ".PNG"),
        ("annotations", "JPEGImages", ".xml", ".png"),
        ("ANNOTATIONS", "images", ".Xml", ".png"),
        ("Annotations", "jpegimages", ".XML", ".png"),
        (".", ".", ".xml", ".png"),
        (".", ".", ".XML", ".png"),
    ],
)
def test_names_in_any_case(
    paint: Make, make_repo: Make, tmp_path: Path, annotations: str, images: str, xml: str, picture: str
) -> None:
    source, repo = tmp_path / "source", make_repo()
    for number, stem in enumerate(STEMS, start=1):
        write(paint, source / images / f"{stem}{picture}", source / annotations / f"{stem}{xml}", number)
    assert recognise(source)[0]
    assert class_names(source) == ("dent",)
    assert voc_folder(source).images == source / images
    labels = read(source)
    assert shown(labels, "error") + shown(labels, "warning") == []
    found = {image.file_name: image.boxes for content in labels.splits.values() for image in content.images}
    assert found.keys() == {f"{stem}{picture}" for stem in STEMS}
    for number, stem in enumerate(STEMS, start=1):
        assert [box.box_xywh_px for box in found[f"{stem}{picture}"]] == [(number - 1, 3, 10, 8)]
    assert register("plates", source, repo=repo).notes[0].startswith("voc: ")


@pytest.mark.parametrize(
    ("images", "lists"),
    [
        ("IMAGES", "ImageSets/Main"), ("IMAGES", "imagesets/MAIN"), ("JpegImages", "Splits"),
        (".", "ImageSets/Main"), (".", "splits"),
    ],
)  # fmt: skip
def test_lists_of_any_case_hold(paint: Make, tmp_path: Path, lists: str, images: str) -> None:
    source = tmp_path / "source"
    (source / lists).mkdir(parents=True)
    for stem, split in zip(STEMS, SPLITS, strict=False):
        write(
            paint, source / images / f"{stem}.png", source / ("." if images == "." else "ANNOTATIONS") / f"{stem}.xml"
        )
        (source / lists / f"{split}.txt").write_text(stem)
    labels = read(source, SplitRule())
    assert shown(labels, "error") == []
    assert [[image.file_name for image in labels.splits[split].images] for split in SPLITS] == [
        ["dent_1.png"], ["dent_2.png"], ["dent_3.png"],
    ]  # fmt: skip


def test_pictures_in_folders_by_class(paint: Make, tmp_path: Path) -> None:
    for number, stem in enumerate(STEMS):
        write(paint, tmp_path / f"images/class{number}/deep/{stem}.png", tmp_path / f"annotations/{stem}.xml")
    labels = read(tmp_path)
    assert shown(labels, "error") + shown(labels, "warning") == []
    assert names(labels) == {f"class{number}/deep/{stem}.png" for number, stem in enumerate(STEMS)}


def test_two_pictures_of_one_xml_are_an_error_that_names_both(paint: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(paint, tmp_path / f"images/{name}/dent_1.png", tmp_path / "annotations/dent_1.xml")
    (error,) = shown(read(tmp_path), "error")
    assert "a/dent_1.png, b/dent_1.png share the annotation file dent_1.xml. Keep one of these pictures" in error
    (tmp_path / "splits").mkdir()
    for split in SPLITS:
        (tmp_path / f"splits/{split}.txt").write_text("dent_1\n")
    (error, *_) = shown(read(tmp_path), "error")
    assert "'dent_1' could be any of a/dent_1.png, b/dent_1.png" in error


def test_two_xml_files_of_one_picture_are_an_error_that_names_both(paint: Make, tmp_path: Path) -> None:
    for suffix in ("xml", "XML"):
        write(paint, tmp_path / "images/dent_1.png", tmp_path / f"annotations/dent_1.{suffix}")
    (error,) = shown(read(tmp_path), "error")
    assert f"{tmp_path}/annotations/dent_1.XML: error: dent_1.xml is of the same picture. Keep one" in error


@pytest.mark.parametrize(
    ("picture", "xml"),
    [
        ("{}/images/dent/{}.png", "{}/annotations/{}.xml"),
        ("{}/JPEGImages/{}.png", "{}/Annotations/{}.XML"),
        ("{}/{}.png", "{}/{}.xml"),
        ("images/{}/{}.png", "annotations/{}{}.xml"),
    ],
)
def test_folders_that_are_called_like_splits(
    paint: Make, make_repo: Make, tmp_path: Path, picture: str, xml: str
) -> None:
    """A picture of another split may have the same name, but for the flat folder of XML files."""
    source, repo = tmp_path / "source", make_repo()
    places = {"train": "train", "Validation": "val", "test": "test"}
    for place in places:
        for letter in "ab":
            stem = f"{place}{letter}" if xml.startswith("annotations") else letter
            write(paint, source / picture.format(place, stem), source / xml.format(stem[:-1] or place, stem[-1]))
    assert recognise(source)[0]
    labels = read(source, None)
    assert labels.divider.rule == SplitRule()
    assert shown(labels, "error") + shown(labels, "warning") == []
    base = voc_folder(source).images
    for place, split in places.items():
        images = labels.splits[split].images
        assert [(base / image.file_name).relative_to(source).as_posix() for image in images] == [
            picture.format(place, f"{place}{letter}" if xml.startswith("annotations") else letter) for letter in "ab"
        ]
        assert all(len(image.boxes) == 1 for image in images)
    assert register("plates", source, repo=repo).card.splits == SplitRule()
    assert len([path for path in (prepare("plates", repo) / "images").rglob("*.png") if path.is_file()]) == 6


def test_pictures_of_a_split_without_xml_files_are_counted(paint: Make, tmp_path: Path) -> None:
    for place in ("train", "valid"):
        write(paint, tmp_path / f"{place}/images/{place}.png", tmp_path / f"{place}/annotations/{place}.xml")
    paint(tmp_path / "test/images/c.png")
    assert shown(read(tmp_path), "warning") == [
        f"{tmp_path}: warning: 1 pictures lie outside the folders that are read, for example 'test/images/c.png'. "
        "Left out when prepared: move them to the others to use them"
    ]


@pytest.mark.parametrize("parts", [("Annotations", "JPEGImages"), ("annotations", "images")])
def test_more_names_do_not_change_how_a_folder_is_read(paint: Make, tmp_path: Path, parts: tuple[str, str]) -> None:
    """What had one of the two layouts before other names were known is read as it was."""
    annotations, images = parts
    for stem in STEMS:
        write(paint, tmp_path / images / f"{stem}.png", tmp_path / annotations / f"{stem}.xml")
    first = read(tmp_path)
    for other in ("IMAGES", "train", f"{images}/small", "."):
        write(paint, tmp_path / other / f"{STEMS[0]}.png", tmp_path / other / f"{STEMS[0]}.xml")
    write(paint, tmp_path / "train/images/a.png", tmp_path / "train/annotations/a.xml")
    second = read(tmp_path)
    assert voc_folder(tmp_path).images == tmp_path / images
    assert {split: content.images for split, content in second.splits.items()} == {
        split: content.images for split, content in first.splits.items()
    }
    assert shown(second, "error") == []
    (warning,) = shown(second, "warning")
    assert "1 pictures lie outside the folders that are read, for example 'small/dent_1.png'" in warning


def test_pictures_and_xml_files_that_do_not_belong_together_are_no_layout(paint: Make, tmp_path: Path) -> None:
    write(paint, tmp_path / "a.png", tmp_path / "b.xml")
    assert recognise(tmp_path) == (
        False, "no Annotations/ beside JPEGImages/, nor annotations/ beside images/, nor XML beside pictures",
    )  # fmt: skip


@pytest.mark.parametrize("is_split", [False, True])
def test_neu_det_as_it_is_published(make_repo: Make, tmp_path: Path, is_split: bool) -> None:
    """In one pair of folders of upper case, or 240 and 60 pictures of each class in folders of their names."""
    if not NEU_DET.is_dir():
        pytest.skip(f"needs NEU-DET in {NEU_DET}: set SPECK_SHARED_DATASETS")
    source, repo = tmp_path / "NEU-DET", make_repo()
    for path in (NEU_DET / "annotations").iterdir():
        name, _, number = path.stem.rpartition("_")
        place = ("train/" if int(number) <= 240 else "validation/") if is_split else ""
        targets = (
            (path, f"{place}annotations/{path.name}" if is_split else f"ANNOTATIONS/{path.name}"),
            (
                NEU_DET / f"images/{path.stem}.jpg",
                f"{place}images/{name}/{path.stem}.jpg" if is_split else f"IMAGES/{path.stem}.jpg",
            ),
        )
        for original, target in targets:
            (source / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, source / target)
    notes = register("neu-det", source, repo=repo).notes
    assert notes[0].startswith("voc: ")
    labels = read_labels("voc", source, class_names(source), SplitRule() if is_split else BY_RATIO)
    counts = [len(labels.splits[split].images) for split in SPLITS]
    if is_split:
        assert counts == [1440, 360, 0]
    else:
        assert sum(counts) == 1800
        assert not any("not as published" in note for note in notes)
    boxes = sum(len(image.boxes) for content in labels.splits.values() for image in content.images)
    assert boxes == 4189 - 3

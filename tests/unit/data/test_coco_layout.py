"""The layouts in which COCO data comes: each is imported with the same boxes, prepared, and put right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data.checking import check
from data.coco_layout import find_layout
from data.fixing import fix
from data.importing import ImportRefused, register
from data.prepare import prepare
from data.problems import Problem
from data.reading import read_labels
from data.records import SPLITS
from data.report import write_report
from data.splits import SplitRule

Make = Callable[..., Path]

# Annotation file and folder of pictures, by split; `{}` is the split.
LAYOUTS = {
    "ours": ("annotations/{}.json", "images", "{}/a.png"),
    "ours, in folders": ("annotations/{}.json", "images/{}", "a.png"),
    "download": ("annotations/instances_{}2017.json", "{}2017", "a.png"),
    "download, years differ": ("annotations/instances_{}2014.json", "images/{}2014", "a.png"),
    "no images folder": ("annotations/{}.json", "{}", "a.png"),
    "export": ("{}/_annotations.coco.json", "{}", "a.png"),
    "names that begin with images": ("annotations/{}.json", "images", "images/{}-a.png"),
}


def lay_out(folder: Path, layout: str, rename: dict[str, str] | None = None, content: bytes | None = None) -> Path:
    """A picture with one box of its own place for every split."""
    file, images, name = LAYOUTS[layout]
    for number, split in enumerate(SPLITS):
        shown = (rename or {}).get(split, split)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        path = folder / images.format(shown) / name.format(shown).removeprefix("images/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or cv2.imencode(".png", pixels)[1].tobytes())
        document: dict[str, Any] = {
            "images": [{"id": 1, "file_name": name.format(shown), "width": 60, "height": 40}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [number, 2, 9, 8], "area": 72}],
            "categories": [{"id": 3, "name": "boat"}],
        }
        target = folder / file.format(shown)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document))
    return folder


def boxes(prepared: Path, split: str) -> list[float]:
    document = json.loads((prepared / f"annotations/{split}.json").read_bytes())
    (image,), (annotation,) = document["images"], document["annotations"]
    assert (prepared / "images" / image["file_name"]).is_file()
    found: list[float] = annotation["bbox"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rename", [{}, {"val": "valid"}], ids=["val", "valid"])
def test_every_layout_is_imported_checked_and_prepared(
    tmp_path: Path, make_repo: Make, layout: str, rename: dict[str, str]
) -> None:
    source, repo = lay_out(tmp_path / "source", layout, rename), make_repo()
    card, notes = register("harbour", source, repo=repo)
    assert (card.format, card.splits.rule, card.classes) == ("coco", "given", ("boat",))
    assert notes[0].startswith("coco: found ")
    assert check("harbour", repo) == []
    prepared = prepare("harbour", repo)
    assert [boxes(prepared, split) for split in SPLITS] == [[number, 2, 9, 8] for number in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_put_right(tmp_path: Path, make_repo: Make, layout: str) -> None:
    """A JPEG under the suffix of a PNG gets its own, and the annotation file the new name in its own terms."""
    pixels = np.random.default_rng(5).integers(0, 256, (40, 60, 3), np.uint8)
    source, repo = lay_out(tmp_path / "source", layout, content=cv2.imencode(".jpg", pixels)[1].tobytes()), make_repo()
    register("harbour", source, repo=repo)
    assert fix("harbour", repo) == {"suffix": 3}
    file, _, name = LAYOUTS[layout]
    document = json.loads((repo / "data/raw/harbour" / file.format("val")).read_bytes())
    assert document["images"][0]["file_name"] == name.format("val").replace("png", "jpg")
    # Three times the same picture.
    assert all("the same bytes" in problem.rule for problem in check("harbour", repo))


def read(folder: Path) -> list[Problem]:
    return read_labels("coco", folder, ("boat",), SplitRule()).problems


def test_the_folder_is_the_one_that_has_the_pictures(tmp_path: Path) -> None:
    """`images/train/` is there, and yet names are relative to `images/`, also where the first picture is lost."""
    folder = lay_out(tmp_path, "ours")
    document = json.loads((folder / "annotations/train.json").read_bytes())
    document["images"].insert(0, {"id": 2, "file_name": "train/lost.png", "width": 9, "height": 9})
    (folder / "annotations/train.json").write_text(json.dumps(document))
    labels = read_labels("coco", folder, ("boat",), SplitRule())
    assert {image.file_name for image in labels.splits["train"].images} == {"train/lost.png", "train/a.png"}


def test_other_files_of_a_download_are_not_asked(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "download")
    for name in ("captions_train2017.json", "person_keypoints_val2017.json", "image_info_test2017.json", "notes.json"):
        (folder / "annotations" / name).write_text("[]")
    assert {split: len(files) for split, files in find_layout(folder).files.items()} == dict.fromkeys(SPLITS, 1)
    assert read(folder) == []


def test_pictures_that_no_file_lists_are_told(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "download")
    (folder / "unlabeled2017").mkdir()
    shutil.copyfile(folder / "val2017/a.png", folder / "unlabeled2017/a.png")
    (problem,) = read(folder)
    assert problem.rule == "1 pictures are in no annotation file, for example unlabeled2017/a.png"
    assert problem.severity == "warning"


def test_two_files_of_one_split_are_an_error(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "download")
    (folder / "train2014").mkdir()
    shutil.copyfile(folder / "annotations/instances_train2017.json", folder / "annotations/instances_train2014.json")
    (problem,) = read(folder)
    assert str(problem).endswith(
        "instances_train2017.json: error: instances_train2014.json is for split 'train' too. Keep one of them"
    )


def test_a_name_of_two_splits_is_no_leak_where_each_has_its_folder(tmp_path: Path) -> None:
    """In downloads the same name may be in train2017/ and val2017/; below `images/` it is one file."""
    assert read(lay_out(tmp_path / "download", "download")) == []
    folder = lay_out(tmp_path / "flat", "ours")
    document = json.loads((folder / "annotations/train.json").read_bytes())
    (folder / "annotations/val.json").write_text(json.dumps(document))
    assert "is in split 'train' too" in str(read(folder)[0])


def test_annotations_without_pictures_are_no_dataset(tmp_path: Path, make_repo: Make) -> None:
    folder = lay_out(tmp_path / "source", "download")
    for split in SPLITS:
        shutil.rmtree(folder / f"{split}2017")
    with pytest.raises(ImportRefused, match="no format that is known"):
        register("harbour", folder, repo=make_repo())


def test_a_split_whose_pictures_are_missing_is_not_passed_over(tmp_path: Path, make_repo: Make) -> None:
    """Else train would be cut up for a split that the files have."""
    folder = lay_out(tmp_path / "source", "download")
    shutil.rmtree(folder / "val2017")
    with pytest.raises(ImportRefused, match=r"instances_val2017\.json: error: the folder of its pictures is missing"):
        register("harbour", folder, repo=make_repo())


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("_annotations.coco.json", ""),
        ("_annotations.coco.json", "images"),
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/all.json", "images"),
    ],
)
def test_one_file_for_all_is_divided(tmp_path: Path, make_repo: Make, file: str, images: str) -> None:
    source, repo = tmp_path / "source", make_repo()
    names = [f"{number}.png" for number in range(60)]
    for number, name in enumerate(names):
        (source / images).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        assert cv2.imwrite(str(source / images / name), pixels)
    rows = [{"id": number, "file_name": name, "width": 60, "height": 40} for number, name in enumerate(names)]
    boxes = [{"id": n, "image_id": n, "category_id": 0, "bbox": [1, 2, 9, 8]} for n in range(60)]
    content = {"images": rows, "annotations": boxes, "categories": [{"id": 0, "name": "boat"}, {"id": 1, "name": "x"}]}
    (source / file).parent.mkdir(parents=True, exist_ok=True)
    (source / file).write_text(json.dumps(content))
    card, notes = register("harbour", source, repo=repo)
    assert (card.format, card.splits.rule, card.classes) == ("coco", "ratio", ("boat", "x"))
    assert "warning: no object is of class x; delete it from the card if it is none" in notes
    prepared = prepare("harbour", repo)
    found = [json.loads((prepared / f"annotations/{split}.json").read_bytes()) for split in SPLITS]
    assert sum(len(document["images"]) for document in found) == 60
    assert min(len(document["images"]) for document in found) > 0


def test_prepared_files_are_read_as_they_were_written(tmp_path: Path, make_repo: Make) -> None:
    """`train/a.png` and `train/train/a.png`: a prepared dataset must not be guessed at."""
    source, repo = lay_out(tmp_path / "source", "export"), make_repo()
    pixels = np.random.default_rng(9).integers(0, 256, (40, 60, 3), np.uint8)
    (source / "train/train").mkdir()
    assert cv2.imwrite(str(source / "train/train/a.png"), pixels)
    document = json.loads((source / "train/_annotations.coco.json").read_bytes())
    document["images"].append({"id": 2, "file_name": "train/a.png", "width": 60, "height": 40})
    (source / "train/_annotations.coco.json").write_text(json.dumps(document))
    register("harbour", source, repo=repo)
    prepare("harbour", repo)
    assert check("harbour", repo) == []
    assert write_report("harbour", "a" * 32, repo).splits["train"].num_images == 2


def test_prepared_files_may_be_links_into_a_cache(tmp_path: Path, make_repo: Make) -> None:
    source, repo = lay_out(tmp_path / "source", "ours"), make_repo()
    register("harbour", source, repo=repo)
    picture = prepare("harbour", repo) / "images/train/a.png"
    picture.rename(tmp_path / "cached")
    picture.symlink_to(tmp_path / "cached")
    assert check("harbour", repo) == []

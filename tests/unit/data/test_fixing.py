from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.checking import check
from data.coco_fixing import fix_coco
from data.coco_layout import CocoFile
from data.decode import read_bgr
from data.fixing import fix
from data.problems import ImportRefused
from data.reading import read_labels
from data.splits import SplitRule

Make = Callable[..., Path]
RNG = np.random.default_rng(0)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def spoil(split: str, document: dict[str, Any]) -> None:
    """A box that sticks out, one without area, one twice, an id twice."""
    document["images"][0]["file_name"] = f"{split}/b.jpg"
    if split == "train":
        rows = document["annotations"]
        rows[0]["bbox"] = [-2, 5, 8, 6]
        rows.append({"id": 5, "image_id": 3, "category_id": 20, "bbox": [50, 50, 30, 30]})
        rows.append({"id": 6, "image_id": 3, "category_id": 20, "bbox": [40, 20, 3, 3]})
        rows.append({"id": 1, "image_id": 7, "category_id": 10, "bbox": [20, 20, 9, 9]})


@pytest.fixture
def odd(coco_folder: Make) -> Path:
    """A COCO folder with pictures that are PNG called .jpg, deep, clear, turned, and one that is cut off."""
    folder = coco_folder(spoil)
    for split in ("train", "val", "test"):
        (folder / f"images/{split}/b.png").rename(folder / f"images/{split}/b.jpg")
    cv2.imwrite(str(folder / "images/train/a.png"), RNG.integers(0, 2**16, (40, 60, 4), np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "images/val/a.png", exif=exif)
    Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "images/val/b.jpg", exif=exif)
    content = (folder / "images/test/a.png").read_bytes()
    (folder / "images/test/a.png").write_bytes(content[:-400])
    return folder


def test_what_can_be_is_put_right_in_a_copy(odd: Path, make_repo: Make) -> None:
    repo = make_repo(odd)
    raw, before = repo / "data/raw/tiny", digests(odd)
    names = ["train/a.png", "train/b.jpg", "val/a.png", "val/b.jpg"]
    pixels = [read_bgr(odd / "images" / name) for name in names]
    assert fix("tiny", repo) == {
        "16 bits": 1, "alpha": 1, "orientation": 2, "suffix": 2,
        "boxes without area": 1, "clipped boxes": 1, "repeated boxes": 1, "repeated annotation ids": 1,
    }  # fmt: skip
    assert not raw.is_symlink()
    assert digests(odd) == before, "what was linked keeps its bytes"
    assert [path.name for path in (repo / "data/raw").iterdir()] == ["tiny"]
    for name, expected in zip(["train/a.png", "train/b.png", "val/a.png", "val/b.jpg"], pixels, strict=True):
        np.testing.assert_array_equal(read_bgr(raw / "images" / name), expected)
    (problem,) = check("tiny", repo)
    assert (problem.path, problem.severity) == (raw / "images/test/a.png", "error"), "what cannot be fixed is left"
    fixed = digests(raw)
    assert fix("tiny", repo) == {}
    assert digests(raw) == fixed


def test_of_a_jpeg_only_the_orientation_changes(odd: Path, make_repo: Make) -> None:
    repo = make_repo(odd)
    fix("tiny", repo)
    old, new = ((folder / "images/val/b.jpg").read_bytes() for folder in (odd, repo / "data/raw/tiny"))
    assert len(old) == len(new)
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1
    with Image.open(repo / "data/raw/tiny/images/val/b.jpg") as image:
        assert dict(image.getexif()) == {0x0112: 1, 0x010F: "a camera"}


def test_a_sound_dataset_stays_a_link(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo(coco_folder())
    assert fix("tiny", repo) == {}
    assert (repo / "data/raw/tiny").is_symlink()


def test_links_within_the_dataset_do_not_lead_back_to_the_original(odd: Path, make_repo: Make, tmp_path: Path) -> None:
    """A folder of our own whose pictures are hard and symbolic links to somebody else's."""
    repo = make_repo(odd)
    raw, before = repo / "data/raw/tiny", digests(odd)
    raw.unlink()
    for name in before:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(odd / name, raw / name)
    (raw / "images/val").rename(tmp_path / "val")
    (raw / "images/val").symlink_to(tmp_path / "val")
    assert fix("tiny", repo)["suffix"] == 2
    assert digests(odd) == before
    assert sorted(os.listdir(tmp_path / "val")) == ["a.png", "b.jpg"]


def pipe(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")


def device(path: Path) -> None:
    (path.parent / "device").symlink_to("/dev/zero")


def link(path: Path) -> None:
    path.rename(path.parents[3] / "elsewhere.png")
    path.symlink_to(path.parents[3] / "elsewhere.png")


@pytest.mark.parametrize(
    ("put", "rule"), [(pipe, "not a regular file"), (device, "not a regular file"), (link, "a link that leads out")]
)
def test_what_cannot_be_copied_changes_nothing(
    odd: Path, make_repo: Make, put: Callable[[Path], None], rule: str
) -> None:
    repo = make_repo(odd)
    put(odd / "images/train/a.png")
    with pytest.raises(ImportRefused, match=rule):
        fix("tiny", repo)
    assert (repo / "data/raw/tiny").is_symlink()
    assert [path.name for path in (repo / "data/raw").iterdir()] == ["tiny"]


def test_a_killed_fix_is_taken_up(odd: Path, make_repo: Make) -> None:
    repo = make_repo(odd)
    (repo / "data/raw/tiny").rename(repo / "data/raw/.tiny.old")
    assert fix("tiny", repo)["suffix"] == 2


def test_a_name_that_is_taken_is_left(odd: Path, make_repo: Make) -> None:
    (odd / "images/train/b.png").write_bytes(b"taken")
    repo = make_repo(odd)
    assert fix("tiny", repo)["suffix"] == 1
    assert (repo / "data/raw/tiny/images/train/b.png").read_bytes() == b"taken"
    assert [problem.path.name for problem in check("tiny", repo)] == ["tiny", "b.jpg", "a.png"], "b.png is in no file"


def voc(folder: Path, number: int) -> Path:
    """Pictures in no list, all 16 bits deep, so that their new bytes would draw new splits."""
    for part in ("annotations", "images"):
        (folder / part).mkdir(parents=True)
    for index in range(number):
        pixels = RNG.integers(0, 2**16, (16, 16), np.uint16)
        (folder / f"images/{index}.jpg").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        (folder / f"annotations/{index}.xml").write_text(
            "<annotation><size><width>16</width><height>16</height></size><object><name>car</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )
    return folder


def test_no_picture_changes_split(tmp_path: Path, make_repo: Make) -> None:
    rule = SplitRule(rule="ratio", pinned={"test": ("7.jpg",)})
    source = voc(tmp_path / "source", 60)
    repo = make_repo(source, classes=("car",), format="voc", splits=rule.model_dump(mode="json"))

    def splits() -> dict[str, str]:
        card = yaml.safe_load((repo / "data/catalog/tiny.yaml").read_text())
        labels = read_labels("voc", repo / "data/raw/tiny", ("car",), SplitRule.model_validate(card["splits"]))
        assert labels.divider.problems == []
        return {Path(image.file_name).stem: split for split, part in labels.splits.items() for image in part.images}

    before = splits()
    assert fix("tiny", repo) == {"16 bits": 60, "suffix": 60}
    assert splits() == before
    pinned = yaml.safe_load((repo / "data/catalog/tiny.yaml").read_text())["splits"]["pinned"]
    assert "7.png" in pinned["test"]
    assert 1 < sum(len(names) for names in pinned.values()) < 60, "only those that would have moved"
    assert [problem for problem in check("tiny", repo) if problem.severity == "error"] == []


def test_yolo_pictures_keep_their_names(tmp_path: Path, make_repo: Make) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    for name in "abc":
        pixels = RNG.integers(0, 256, (16, 16, 4), np.uint8)
        (source / f"images/{name}.jpg").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        (source / f"images/{name}.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    (source / "data.names").write_text("car\n")
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        (source / f"{split}.txt").write_text(f"images/{name}.jpg\n")
    repo = make_repo(source, classes=("car",), format="yolo")
    assert fix("tiny", repo) == {"alpha": 3}
    assert [problem.rule.partition(":")[0] for problem in check("tiny", repo)] == ["the suffix '.jpg' is wrong"] * 3


sides = st.sampled_from([0, 1, 7.5, 30, 59, 70, -3, "x", None, 1e13])
rows = st.fixed_dictionaries(
    {"id": st.sampled_from([1, 2, 3, "a"]), "image_id": st.sampled_from([3, 7, 9]), "category_id": st.just(10)},
    optional={"bbox": st.lists(sides, min_size=4, max_size=4), "iscrowd": st.just(1), "ignore": st.just(1)},
)


@given(st.lists(rows, max_size=8))
def test_labels_are_right_after_once_and_malformed_rows_stay(
    tmp_path_factory: pytest.TempPathFactory, annotations: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "train.json"
    file = CocoFile(path, ("",))
    images = [{"id": key, "file_name": f"{key}.png", "width": 60, "height": 40} for key in (3, 7)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    planned = fix_coco(file, path.parent, {}, write=False)
    assert json.loads(path.read_text())["annotations"] == annotations
    assert fix_coco(file, path.parent, {}, write=True) == planned
    kept = json.loads(path.read_text())["annotations"]
    assert fix_coco(file, path.parent, {}, write=True) == {}
    assert len(kept) == len(annotations) - planned["boxes without area"] - planned["repeated boxes"]
    malformed = [row for row in annotations if row["id"] == "a" or row["image_id"] == 9 or "bbox" not in row]
    assert [row for row in kept if row["id"] == "a" or row["image_id"] == 9 or "bbox" not in row] == malformed


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": 1}', '{"images": [1], "annotations": []}', "[" * 10**5]
)
def test_files_that_are_not_coco_stay(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    assert fix_coco(CocoFile(path, ("",)), tmp_path, {"a": "b"}, write=True) == {}
    assert path.read_text() == content
    assert fix_coco(CocoFile(tmp_path / "gone.json", ("",)), tmp_path, {}, write=True) == {}

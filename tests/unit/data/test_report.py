from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from data.prepare import prepare
from data.records import Box, ImageRecord
from data.report import report_folder, summary, write_report
from data.report_change import MAX_EXAMPLES, change_since
from data.report_pictures import NUM_PICTURES, chosen

Make = Callable[..., Path]
A, B, C = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture
def repo(coco_folder: Make, make_repo: Make) -> Path:
    made = make_repo(coco_folder())
    prepare("tiny", made)
    return made


def edit(repo: Path, split: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = repo / f"data/processed/tiny/annotations/{split}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def files(repo: Path, version: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in report_folder("tiny", version, repo).iterdir()}


def test_a_version_gives_the_same_bytes_every_time(repo: Path) -> None:
    write_report("tiny", A, repo)
    first = files(repo, A)
    assert set(first) == {"report.html", "report.json", "images.json"}
    write_report("tiny", B, repo)
    write_report("tiny", A, repo)
    assert files(repo, A) == first


def test_the_entry_of_dvc_lock_is_kept_with_it(repo: Path) -> None:
    """Of the version that is reported alone: dvc.lock may have moved on."""
    entry = {"cmd": "prepare", "outs": [{"path": "data/processed/tiny", "md5": f"{A}.dir", "nfiles": 9, "size": 1}]}
    (repo / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"prepare@tiny": entry, "other": {}}}))
    write_report("tiny", A, repo)
    write_report("tiny", B, repo)
    assert yaml.safe_load(files(repo, A)["dvc.lock"]) == {"schema": "2.0", "stages": {"prepare@tiny": entry}}
    assert "dvc.lock" not in files(repo, B)


def test_the_json_is_what_was_returned(repo: Path) -> None:
    report = write_report("tiny", A, repo)
    stored = json.loads(files(repo, A)["report.json"])
    assert stored == json.loads(json.dumps(asdict(report)))
    assert stored["splits"]["train"]["objects_per_class"] == {"car": 1, "boat": 2}
    assert stored["splits"]["train"]["num_crowd_boxes"] == 1
    assert stored["change"] is None


def test_the_page_needs_nothing_from_elsewhere(repo: Path) -> None:
    write_report("tiny", A, repo)
    page = files(repo, A)["report.html"].decode()
    assert set(re.findall(r"""(?:href|src)=["']([a-z]+:[a-z/]+)""", page)) <= {"data:image/jpeg", "data:image/png"}
    assert not re.findall(r"https?://|<script|url\(|@import|<link", page)
    assert "default-src 'none'" in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) > 10
    for svg in svgs:
        ET.fromstring(svg)


def test_names_from_the_data_cannot_write_html(coco_folder: Make, make_repo: Make) -> None:
    evil = "<script>alert('x')</script>&\""

    def rename(split: str, document: dict[str, Any]) -> None:
        document["categories"][0]["name"] = evil

    made = make_repo(coco_folder(rename), classes=("car", evil), description=evil, licence=evil)
    prepare("tiny", made)
    write_report("tiny", A, made)
    page = files(made, A)["report.html"].decode()
    assert "<script" not in page
    assert evil in unescape(page)


def test_every_box_of_a_shown_picture_is_drawn_and_ignored_area_too(repo: Path) -> None:
    """Two pictures per split, all of them shown: each box once as a whole, and again where it is enlarged."""
    write_report("tiny", A, repo)
    page = files(repo, A)["report.html"].decode()
    titles = re.findall(r"<rect[^>]*><title>([^<]*)</title></rect>", page)
    for title in ("boat, 8x6 px", "car, 10x4 px", "boat, 3x3 px", "car, crowd, 20x15 px", "ignore region"):
        assert titles.count(title) >= 3, title
    assert "boat<br>3x3" in page


def test_changes_since_the_version_before(repo: Path) -> None:
    write_report("tiny", A, repo)
    images = repo / "data/processed/tiny/images"
    # One picture's boxes, another's pixels, a third's split, one gone and one new; a fourth's boxes only change places.
    edit(repo, "train", lambda document: document["annotations"][0].update(bbox=[1.25, 2.5, 11, 4]))
    cv2.imwrite(str(images / "val/b.png"), np.zeros((40, 60, 3), np.uint8))
    rows = json.loads((repo / "data/processed/tiny/annotations/train.json").read_text())["images"]
    moved = next(row for row in rows if row["file_name"] == "train/b.png")

    def move(document: dict[str, Any]) -> None:
        document["images"] = [row for row in document["images"] if row["file_name"] != "test/b.png"]
        document["annotations"] = [row for row in document["annotations"] if row["image_id"] == 3]
        document["images"].append(moved | {"id": 50})
        document["images"].append(moved | {"id": 51, "file_name": "test/new.png"})
        row = {"category_id": 2, "image_id": 50, "bbox": [10, 5, 8, 6], "area": 30.0, "iscrowd": 0}
        crowd = {"category_id": 1, "image_id": 50, "bbox": [30, 20, 20, 15], "area": 250.0, "iscrowd": 1}
        document["annotations"] += [crowd | {"id": 90}, row | {"id": 91}, row | {"id": 92, "image_id": 51}]

    def leave(document: dict[str, Any]) -> None:
        document["images"] = [row for row in document["images"] if row["file_name"] != "train/b.png"]
        document["annotations"] = [row for row in document["annotations"] if row["image_id"] != moved["id"]]

    edit(repo, "test", move)
    edit(repo, "train", leave)
    cv2.imwrite(str(images / "test/new.png"), np.full((40, 60, 3), 9, np.uint8))
    report = write_report("tiny", B, repo)
    assert report.change is not None
    assert report.change.previous == A
    assert report.change.num_images == {"added": 1, "removed": 1, "relabelled": 1, "replaced": 1, "moved": 1}
    assert report.change.examples == {
        "added": ["test/new.png"], "removed": ["test/b.png"], "relabelled": ["train/a.png"],
        "replaced": ["val/b.png"], "moved": ["train/b.png"],
    }  # fmt: skip
    assert report.change.objects_per_class == {"car": (3, 3), "boat": (6, 6)}
    assert "1 added, 1 removed, 1 relabelled, 1 replaced, 1 moved" in summary(report)[-1]


def test_the_version_before_is_the_one_reported_before(repo: Path) -> None:
    """Back to A and on to C: what C changed, it changed from A."""
    previous = [write_report("tiny", version, repo).change for version in (A, B, A, C, B)]
    assert [change.previous if change else None for change in previous] == [None, A, None, A, A]
    (report_folder("tiny", A, repo) / "images.json").unlink()
    again = write_report("tiny", C, repo).change
    assert again is not None
    assert again.previous == B


def test_many_names_are_counted_not_listed() -> None:
    now = {f"{number:03}.png": ["train", "0", "0"] for number in range(100)}
    change = change_since(A, {}, now, {"old": 3}, {"new": 5})
    assert change.num_images["added"] == 100
    assert change.examples == {"added": sorted(now)[:MAX_EXAMPLES]}
    assert change.objects_per_class == {"new": (0, 5), "old": (3, 0)}


def test_missing_files_are_named(repo: Path) -> None:
    (repo / "data/processed/tiny/images/val/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"val/a\.png"):
        write_report("tiny", A, repo)
    (repo / "data/processed/tiny").rename(repo / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"dataset 'tiny' is not prepared\. Run `dvc repro prepare@tiny`"):
        write_report("tiny", A, repo)
    assert not report_folder("tiny", A, repo).exists()


def test_pictures_are_chosen_for_what_they_show() -> None:
    def image(number: int, *boxes: Box, ignored: Any = ()) -> ImageRecord:
        return ImageRecord(number, f"{number}.png", 100, 100, boxes, ignored)

    box = Box(0, (0, 0, 9, 9), 81)
    records = [image(number, box) for number in range(20)]
    records[3] = image(3, *[box] * 9)
    records[5] = image(5, box, Box(0, (0, 0, 2, 2), 4))
    records[7] = image(7, box, ignored=((0, 0, 50, 50),))
    records[11] = image(11)
    records[13] = image(13, Box(1, (0, 0, 9, 9), 81))
    found = {picture.record.image_id: picture.why for picture in chosen(records, ("car", "rare"))}
    assert len(found) == NUM_PICTURES
    assert [found[number] for number in (3, 5, 7, 11, 13)] == [
        "most objects", "smallest object", "most ignored area", "no object", "with rare",
    ]  # fmt: skip
    assert len(chosen(records[:3], ("car", "rare"))) == 3
    assert [picture.why for picture in chosen([image(1)], ("car",))] == ["no object"]

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.checking import check
from data.prepare import prepare
from data.problems import MAX_SHOWN, InvalidDataset, Problem, listing
from data.reading import read_raw
from data.splits import SplitRule
from data.summary import DatasetSummary, summaries

Make = Callable[..., Path]


def _spoil(split: str, document: dict[str, Any]) -> None:
    if split == "train":
        document["annotations"][0]["bbox"] = [10, 5, 0, 6]
        document["annotations"][1]["bbox"] = [-1, 2.5, 10, 4]
        document["annotations"][3]["category_id"] = 30


def test_raw_problems_by_severity(coco_folder: Make, make_repo: Make) -> None:
    source = coco_folder(_spoil)
    (source / "images/val/a.png").unlink()
    repo = make_repo(source)
    found = {(problem.severity, problem.path.name, problem.rule.split(": ")[0]) for problem in check("tiny", repo)}
    assert found == {
        ("warning", "train.json", "annotation 1"),
        ("warning", "train.json", "annotation 2"),
        ("error", "train.json", "annotation 4"),
        ("error", "a.png", "the image is missing"),
    }


def test_prepared_files_are_checked_too(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo(coco_folder())
    folder = prepare("tiny", repo)
    assert check("tiny", repo) == []
    (folder / "images/test/b.png").write_bytes(b"")
    (problem,) = check("tiny", repo)
    assert (problem.path, problem.severity) == (folder / "images/test/b.png", "error")


def test_the_same_picture_under_two_names(coco_folder: Make, make_repo: Make) -> None:
    """Between splits it is a leak and stops preparation; within one it is only said."""
    source = coco_folder()
    shutil.copyfile(source / "images/train/a.png", source / "images/train/b.png")
    repo = make_repo(source)
    (warning,) = check("tiny", repo)
    assert (warning.severity, warning.path.name) == ("warning", "b.png")
    assert warning.rule == "the same bytes as 'train/a.png', also in split 'train': one picture counts twice"
    assert prepare("tiny", repo).is_dir()
    shutil.copyfile(source / "images/train/a.png", source / "images/test/a.png")
    with pytest.raises(InvalidDataset, match=r"leak: split 'test' holds the same bytes as 'train/a\.png' in 'train'"):
        prepare("tiny", repo)


def test_all_faults_of_labels_at_once(coco_folder: Make, make_repo: Make) -> None:
    def spoil(split: str, document: dict[str, Any]) -> None:
        if split == "train":
            rows, image = document["annotations"], document["images"][0]
            rows.append(rows[0] | {"id": 5})
            rows.append(rows[3] | {"bbox": [1, 1, 2, 2]})
            rows.append({"id": 7, "image_id": 7, "category_id": 20, "bbox": [float("nan"), 0, 1, 1]})
            rows.append({"id": 8, "image_id": 7, "category_id": 30, "bbox": [0, 0, 1, 1]})
            rows.append({"id": 9, "image_id": 8, "category_id": 20, "bbox": [0, 0, 1, 1]})
            rows.append({"id": 10, "image_id": 7, "category_id": 20, "bbox": [90, 0, 1, 1]})
            document["images"].append(image | {"file_name": "train/c.png"})
            document["categories"].append({"id": 20, "name": "bike"})

    problems = check("tiny", make_repo(coco_folder(spoil)))
    assert {(problem.severity, problem.rule) for problem in problems} == {
        ("error", "image id 7 occurs twice"),
        ("error", "category id 20 or name 'bike' occurs twice"),
        ("warning", "annotation 5: box [10, 5, 8, 6] of class 'boat' occurs twice"),
        ("error", "annotation id 4 occurs twice"),
        ("error", "annotations[6] needs an integer 'id' and a 'bbox' of 4 finite numbers"),
        ("error", "annotation 8: category 30 is not one of the card's classes"),
        ("error", "annotation 9: no sound image has id 8"),
        ("warning", "annotation 10: box [90, 0, 1, 1] has no area inside its 60x40 px image"),
    }


def test_a_repeated_box_is_counted_and_left_out(coco_folder: Make) -> None:
    """Of another class, and for another picture, it is another box."""

    def repeat(split: str, document: dict[str, Any]) -> None:
        box = document["annotations"][0]
        document["annotations"] += [box | {"id": 5}, box | {"id": 6, "category_id": 10}, box | {"id": 7, "image_id": 3}]

    train = read_raw("coco", coco_folder(repeat), ("car", "boat"), SplitRule()).splits["train"]
    assert train.num_boxes_excluded == 1
    assert sum(len(image.boxes) for image in train.images) == 6


def test_one_sequence_in_two_splits(coco_folder: Make, make_repo: Make) -> None:
    """All splits hold pictures a and b; the rule's pattern makes each letter a sequence."""
    repo = make_repo(coco_folder(), splits={"rule": "by-sequence", "sequence": r"([ab])\.png"})
    (problem,) = check("tiny", repo)
    assert (problem.severity, problem.rule) == (
        "warning",
        "2 sequences, for example b, a, are in several splits as the files have it",
    )


def test_missing_raw_data(make_repo: Make, tmp_path: Path) -> None:
    (problem,) = check("tiny", make_repo(tmp_path / "gone"))
    assert str(problem).endswith(f"the raw data is missing. Bring it back to {tmp_path / 'gone'}")


def test_long_listings_show_errors_first_and_count_the_rest() -> None:
    warning = Problem(Path("a.json"), None, "w", "r", "warning")
    problems = [warning] * (MAX_SHOWN + 5) + [Problem(Path("b.txt"), 7, "e", "r")]
    lines = listing(problems).splitlines()
    assert lines[0] == "b.txt:7: error: e. r"
    assert lines[-1] == "... and 6 more"
    assert len(lines) == MAX_SHOWN + 1


def test_summaries(coco_folder: Make, make_repo: Make) -> None:
    def spoil(split: str, document: dict[str, Any]) -> None:
        document["annotations"][0]["bbox"] = [10, 5, 0, 6] if split == "train" else [-2, 5, 8, 6]

    repo = make_repo(coco_folder(spoil))
    assert summaries(repo) == [DatasetSummary("tiny", None, {}, None, None)]
    output = {"path": "data/processed/tiny", "md5": "ab" * 16 + ".dir", "size": 99, "nfiles": 9}
    (repo / "dvc.lock").write_text(yaml.safe_dump({"stages": {"prepare@tiny": {"outs": [output]}}}))
    assert summaries(repo) == [DatasetSummary("tiny", "ab" * 16, {}, None, 99)]
    prepare("tiny", repo)
    images = {"train": 2, "val": 2, "test": 2}
    assert summaries(repo) == [
        DatasetSummary("tiny", "ab" * 16, images, 11, 99, num_boxes_clipped=2, num_boxes_excluded=1)
    ]

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.importing import register
from data.reading import Labels, read_labels
from data.records import SPLITS
from data.splits import SplitRule
from data.uavdt import CLASSES

Make = Callable[..., Path]
SEQUENCES = {"M0101": "train", "M0201": "train", "M0203": "test"}


@pytest.fixture
def folder(tmp_path: Path, paint: Make) -> Path:
    """Three sequences of three frames, laid out as the benchmark is."""
    root = tmp_path / "source"
    for sequence, split in SEQUENCES.items():
        for frame in (1, 2, 3):
            paint(root / "UAV-benchmark-M" / sequence / f"img{frame:06d}.png")
        for name, text in (
            (f"GT/{sequence}_gt_whole.txt", "1,1,3,4,10,8,1,1,1\n1,2,20,10,5,5,1,1,3\n3,1,6,7,8,9,2,1,2\n"),
            (f"GT/{sequence}_gt_ignore.txt", "1,1,40,20,30,30,1,-1,-1\n"),
            (f"M_attr/{split}/{sequence}_attr.txt", "1,0,0\n"),
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    (root / "GT/M0203_gt_ignore.txt").unlink()
    return root


def read(folder: Path, rule: SplitRule | None = None) -> Labels:
    return read_labels("uavdt", folder, CLASSES, rule)


def shown(labels: Labels) -> list[str]:
    return [str(problem) for problem in labels.problems]


BY_SEQUENCE = SplitRule(rule="by-sequence", sequence=r"(M\d{4})/", pinned={"val": ("M0201",)})


def test_frames_have_their_boxes_and_regions(folder: Path) -> None:
    labels = read(folder, BY_SEQUENCE)
    assert shown(labels) == []
    assert labels.divider.problems == []
    for split, sequence in zip(SPLITS, ("M0101", "M0201", "M0203"), strict=True):
        images = labels.splits[split].images
        assert [image.file_name for image in images] == [
            f"UAV-benchmark-M/{sequence}/img00000{n}.png" for n in (1, 2, 3)
        ]
        assert [[(box.label, box.box_xywh_px) for box in image.boxes] for image in images] == [
            [(0, (3, 4, 10, 8)), (2, (20, 10, 5, 5))], [], [(1, (6, 7, 8, 9))],
        ]  # fmt: skip
        regions = [image.ignore_xywh_px for image in images]
        assert regions == [((40, 20, 20, 20),) if split != "test" else (), (), ()]


def test_the_attribute_files_say_the_split(folder: Path, make_repo: Make) -> None:
    """Val is lacking and taken out of train, so test is what it was."""
    card, notes = register("traffic", folder, repo=make_repo())
    assert (card.format, card.splits.rule) == ("uavdt", "ratio")
    assert notes[0] == "uavdt: 3 files *_gt_whole.txt and pictures of 3 of these sequences"
    assert {Path(image.file_name).parent.name for image in read(folder).splits["test"].images} == {"M0203"}


def test_all_problems_come_at_once(folder: Path, paint: Make) -> None:
    whole = folder / "GT/M0101_gt_whole.txt"
    whole.write_text(
        "1,1,3,4,10,8,1,1,4\n1,2,20\nx,2,20,10,5,5,1,1,3\n9,1,6,7,8,9,2,1,2\n2,1,70,7,8,9,2,1,2\n2,1,55,7,8,9,2,1,2"
    )
    (folder / "GT/M0999_gt_whole.txt").write_text("")
    (folder / "GT/M0998_gt_ignore.txt").write_text("")
    paint(folder / "UAV-benchmark-M/M0777/img000001.png")
    paint(folder / "UAV-benchmark-M/M0101/img1.png")
    labels = read(folder, BY_SEQUENCE)
    remedy = "Left out when prepared: add what is missing"
    assert shown(labels) == [
        f"{folder}: warning: 1 sequences have no pictures, for example M0999. {remedy}",
        f"{folder}: warning: 1 files of ignore regions have no sequence, for example M0998. {remedy}",
        f"{folder}: warning: 2 pictures are of no sequence or repeat a frame, for example "
        f"UAV-benchmark-M/M0101/img1.png, UAV-benchmark-M/M0777/img000001.png. {remedy}",
        f"{whole}:1:18: error: category 4 is none of the card's classes; 1 is car, 2 truck, 3 bus. "
        "Known: car, truck, bus",
        f"{whole}:2: error: a row has 9 fields (frame,id,x,y,w,h,out-of-view,occlusion,category), found 3. Correct it",
        f"{whole}:3:1: error: frame must be a whole number, found 'x'. Correct it",
        f"{whole}: warning: 1 frames of M0101 have boxes and no picture, for example 9. "
        "Left out when prepared: add the pictures",
        f"{whole}:5: warning: box [70, 7, 8, 9] (x, y, w, h) has no area inside its 60x40 px image. "
        "Left out when prepared: mend or delete it",
        f"{whole}:6: warning: box [55, 7, 8, 9] (x, y, w, h) sticks out of its 60x40 px image. Clipped when prepared",
    ]


def test_a_sequence_is_parsed_once_though_its_frames_are_in_two_splits(folder: Path) -> None:
    (folder / "GT/M0101_gt_whole.txt").write_text("broken\n")
    rule = SplitRule(rule="ratio", pinned={"val": ("UAV-benchmark-M/M0101/img000002.png",)})
    assert len([text for text in shown(read(folder, rule)) if "M0101" in text]) == 1

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cleaning import ImageBoxes
from data.importing import ImportRefused, register
from data.prepare import prepare
from data.problems import Problem
from data.reading import Labels, read_labels
from data.records import SPLITS, Split
from data.splits import SplitRule
from data.yolo import class_names, read_label_file, recognise

Make = Callable[..., Path]
CLASSES = ("car", "boat")
LABELS = "0 0.5 0.5 0.2 0.25\n1 0.25 0.75 0.1 0.1\n"


@pytest.fixture
def folder(tmp_path: Path, paint: Make) -> Path:
    """images/ and labels/ by split, and a data.yaml without a word about splits."""
    root = tmp_path / "source"
    for split in SPLITS:
        for letter in "ab":
            paint(root / "images" / split / f"{letter}.png")
            label = root / "labels" / split / f"{letter}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(LABELS)
    (root / "data.yaml").write_text("names: [boat, car]\n")
    return root


def read(folder: Path, rule: SplitRule | None = None) -> Labels:
    return read_labels("yolo", folder, CLASSES, rule)


def shown(labels: Labels) -> list[str]:
    return [str(problem) for problem in labels.problems]


def names(labels: Labels) -> dict[str, list[str]]:
    return {split: [image.file_name for image in content.images] for split, content in labels.splits.items()}


EVERY = {split: [f"images/{split}/a.png", f"images/{split}/b.png"] for split in SPLITS}


def test_import_and_prepare(folder: Path, make_repo: Make) -> None:
    """Labels count in the file's order of names, the card has its own."""
    repo = make_repo()
    card, notes = register("harbour", folder, repo=repo)
    assert (card.format, card.classes, card.splits.rule) == ("yolo", ("boat", "car"), "given")
    assert notes[0] == "yolo: data.yaml names 2 classes and 6 pictures have a label file"
    assert notes[1] == "train 2 images with 4 boxes, val 2 images with 4 boxes, test 2 images with 4 boxes"
    prepared = prepare("harbour", repo)
    assert (prepared / "images/images/train/a.png").read_bytes() == (folder / "images/train/a.png").read_bytes()
    labels = read(folder)
    assert shown(labels) == []
    assert names(labels) == EVERY
    assert [image.image_id for split in SPLITS for image in labels.splits[split].images] == [1, 2, 3, 4, 5, 6]
    first = labels.splits["train"].images[0]
    assert (first.width_px, first.height_px) == (60, 40)
    assert [(box.label, box.box_xywh_px, box.area_px) for box in first.boxes] == [
        (1, (24, 15, 12, 10), 120), (0, (12, 28, 6, 4), 24),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/train\nval: images/val\ntest: images/test",
        "path: images\ntrain: train\nval: [val]\ntest: test\nnc: 2",
        "path: /content/data\ntrain: ../images/train\nvalid: ./images/val/\ntest: images/test/",
        "train: lists/train.txt\nval: images/val\ntest: [images/test/a.png, images/test/b.png]",
    ],
)
def test_splits_are_where_the_yaml_says(folder: Path, text: str) -> None:
    if "lists" in text:
        (folder / "lists").mkdir()
        (folder / "lists/train.txt").write_text("images/train/a.png\n\n../images/train/b.png\n")
    (folder / "data.yaml").write_text(f"{text}\nnames: {{1: car, 0: boat}}\n")
    labels = read(folder)
    assert (shown(labels), names(labels)) == ([], EVERY)


def test_darknet_names_and_lists(folder: Path) -> None:
    (folder / "data.yaml").unlink()
    (folder / "obj.names").write_text("boat\ncar\n\n")
    for split, stem in zip(SPLITS, ("train", "valid", "test"), strict=True):
        (folder / f"{stem}.txt").write_text("".join(f"{name}\n" for name in EVERY[split]))
    labels = read(folder)
    assert (shown(labels), names(labels)) == ([], EVERY)
    assert class_names(folder) == ("boat", "car")


def test_lists_that_were_written_on_windows(folder: Path) -> None:
    (folder / "data.yaml").write_text("names: [boat, car]\ntrain: train.txt\nval: images/val\ntest: images/test\n")
    (folder / "train.txt").write_bytes(b".\\images\\train\\a.png\r\nimages\\train\\b.png\r\n")
    labels = read(folder)
    assert shown(labels) == []
    assert names(labels) == EVERY


def test_two_pictures_of_one_label_file(folder: Path, paint: Make) -> None:
    """Without a label file they share nothing."""
    paint(folder / "images/train/a.jpg")
    paint(folder / "images/val/c.jpg")
    paint(folder / "images/val/c.png")
    errors = [text for text in shown(read(folder)) if ": error: " in text]
    assert errors == [
        f"{folder / 'labels/train/a.txt'}: error: images/train/a.jpg, images/train/a.png share this label file. "
        "Rename all but one of these pictures, or remove them"
    ]


def test_labels_beside_pictures_and_folders_of_splits(tmp_path: Path, paint: Make) -> None:
    (tmp_path / "x.yml").write_text("names: [car, boat]\n")
    for split in ("train", "valid", "test"):
        paint(tmp_path / split / "a.JPG").with_suffix(".txt").write_text(LABELS)
    labels = read(tmp_path)
    assert names(labels) == {"train": ["train/a.JPG"], "val": ["valid/a.JPG"], "test": ["test/a.JPG"]}
    assert shown(labels) == []


def test_a_picture_without_labels_has_no_objects(folder: Path) -> None:
    (folder / "labels/val/a.txt").unlink()
    (folder / "labels/val/b.txt").write_text("\n")
    (folder / "labels/val/lonely.txt").write_text(LABELS)
    labels = read(folder)
    assert [image.boxes for image in labels.splits["val"].images] == [(), ()]
    assert [text.partition(": warning: ")[2] for text in shown(labels)] == [
        "1 pictures have no label file, for example images/val/a.png. Taken as pictures without objects",
        "1 text files are labels of no picture in a split, for example labels/val/lonely.txt. "
        "Left out when prepared: add or list the pictures to use them",
    ]


def test_pictures_that_no_entry_names(folder: Path) -> None:
    """With labels they may be divided; without them they are not data."""
    (folder / "data.yaml").write_text("names: [boat, car]\ntrain: images/train\nval: images/val\n")
    (folder / "labels/test/b.txt").unlink()
    labels = read(folder, SplitRule(rule="ratio", pinned={"test": ("images/test/a.png",)}))
    assert names(labels)["test"][0] == "images/test/a.png"
    assert "1 pictures are in no split and have no label file" in shown(labels)[0]


def test_all_problems_come_at_once(folder: Path) -> None:
    rows = [
        "0 0.5 0.5 0.2",
        "0 0.5 0.5 0.2 0.1 0.9",
        "2 0.5 0.5 0.2 0.1",
        "1.5 0.5 0.5 0.2 0.1",
        "0 nan 0.5 0.2 0.1",
        "0 0.5 512 0.2 0.1",
        "0 0.5 0.5 1e400 0.1",
        "0 0.5 0.5 0.2 1_0",
        "0 " + "0.1 " * 200,
    ]
    path = folder / "labels/train/a.txt"
    path.write_text("\r\n".join(rows))
    (folder / "labels/train/b.txt").write_bytes(b"\xff\xfe0 0")
    (folder / "images/val/a.png").write_bytes(b"not a picture")
    (folder / "images/val/b.png").write_bytes(b"")
    values = ((5, 3, "cx", "nan"), (6, 7, "cy", "512"), (7, 11, "w", "1e400"), (8, 15, "h", "1_0"))
    expected = [
        f"{path}:1: error: a row has 5 fields (class cx cy w h), found 4. Write boxes, not polygons or detections",
        f"{path}:2: error: a row has 5 fields (class cx cy w h), found 6. Write boxes, not polygons or detections",
        f"{path}:3:1: error: class must be a number from 0 to 1, found '2'. Classes: boat, car",
        f"{path}:4:1: error: class must be a number from 0 to 1, found '1.5'. Classes: boat, car",
    ] + [
        f"{path}:{line}:{column}: error: {name} must be a share of the picture, 0 to 1, found {text!r}. "
        "Divide pixels by the picture's width or height"
        for line, column, name, text in values
    ]  # fmt: skip
    labels = read(folder)
    assert shown(labels)[:8] == expected
    assert ":9: error: a row has 5 fields (class cx cy w h), found more than 64" in shown(labels)[8]
    assert "b.txt: error: not a text file in UTF-8" in shown(labels)[9]
    assert "images/val/a.png: error: not an image" in shown(labels)[10]
    assert "images/val/b.png: error: the file is empty (0 bytes)" in shown(labels)[11]
    assert len(labels.problems) == 12


def test_boxes_that_stick_out_have_no_area_or_come_twice(folder: Path) -> None:
    path = folder / "labels/train/a.txt"
    path.write_text("0 0.05 0.5 0.2 0.5\n0 0.5 0.5 0 0.5\n1 0.5 0.5 0.5 0.5\n1 .5 .5 .5 .5\n0 1.5 0.5 0.2 0.2\n")
    labels = read(folder)
    content = labels.splits["train"]
    assert [box.box_xywh_px for box in content.images[0].boxes] == [(0, 10, 9, 20), (15, 10, 30, 20)]
    assert (content.num_boxes_clipped, content.num_boxes_excluded) == (1, 3)
    assert [text.removeprefix(str(path)).replace(" (cx, cy, w, h)", "") for text in shown(labels)] == [
        ":1: warning: box ['0.05', '0.5', '0.2', '0.5'] sticks out of its 60x40 px image. Clipped when prepared",
        ":2: warning: box ['0.5', '0.5', '0', '0.5'] has no area inside its 60x40 px image. "
        "Left out when prepared: mend or delete it",
        ":4: warning: box ['.5', '.5', '.5', '.5'] of class 'car' occurs twice. "
        "Kept once when prepared: delete the repetition",
        ":5: warning: box ['1.5', '0.5', '0.2', '0.2'] has no area inside its 60x40 px image. "
        "Left out when prepared: mend or delete it",
    ]  # fmt: skip


share = st.integers(0, 64).map(lambda value: value / 64)


@settings(max_examples=60)
@given(st.lists(st.tuples(share, share, share, share), max_size=5, unique=True))
def test_boxes_cover_the_pixels_they_name(
    tmp_path_factory: pytest.TempPathFactory, boxes: list[tuple[float, ...]]
) -> None:
    """In a picture of 128x64 px all products are exact, so the oracle is plain arithmetic on corners."""
    path = tmp_path_factory.mktemp("labels") / "a.txt"
    path.write_text("".join(f"0 {' '.join(map(str, box))}\n" for box in boxes))
    content = Split()
    found = ImageBoxes(content, 128, 64)
    read_label_file(path, ("dent",), {"dent": 0}, found)
    expected = []
    for cx, cy, w, h in boxes:
        corners = [(cx - w / 2) * 128, (cy - h / 2) * 64, (cx + w / 2) * 128, (cy + h / 2) * 64]
        x1, y1, x2, y2 = max(corners[0], 0), max(corners[1], 0), min(corners[2], 128), min(corners[3], 64)
        if x2 > x1 and y2 > y1 and (x1, y1, x2 - x1, y2 - y1) not in expected:
            expected.append((x1, y1, x2 - x1, y2 - y1))
    assert [box.box_xywh_px for box in found.record(1, "a.png").boxes] == expected
    assert content.num_boxes_excluded == len(boxes) - len(expected)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ("../../etc", "train: '../../etc' is no file or folder below this one"),
        ("/etc", "train: '/etc' is no file or folder below this one"),
        ("absent", "train: 'absent' is no file or folder below this one"),
        ("labels", "train: the split has no images in 'labels'"),
        ("list.txt", "list.txt:1: error: '/etc/passwd' is no picture below this folder"),
        ("list.txt", "list.txt:2: error: '../../secret.png' is no picture below this folder"),
        ("list.txt", "list.txt:3: error: 'labels/train/a.txt' is no picture below this folder"),
        ("list.txt", "data.yaml: error: 'images/val/a.png' is in list.txt:4 already"),
        ("list.txt", r"list.txt:5: error: 'C:\\images\\a.png' is no picture below this folder"),
        ("empty.txt", "empty.txt: error: the split has no images"),
    ],
)
def test_entries_and_lists_stay_in_the_folder(folder: Path, entry: str, rule: str) -> None:
    (folder.parent / "secret.png").write_bytes(b"")
    lines = ["/etc/passwd", "../../secret.png", "labels/train/a.txt", "images/val/a.png", "C:\\images\\a.png"]
    (folder / "list.txt").write_text("\n".join(lines))
    (folder / "empty.txt").write_text("")
    (folder / "data.yaml").write_text(f"names: [boat, car]\nval: images/val\ntest: images/test\ntrain: {entry}\n")
    assert any(rule in text for text in shown(read(folder))), shown(read(folder))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "names: !!python/object/apply:os.system [ls]",
            "data.yaml:1:8: error: anchors, aliases and tags are not allowed",
        ),
        ("a: &a [x]\nnames: [*a]", "data.yaml:1:4: error: anchors, aliases and tags are not allowed"),
        ("names: [car, [", "data.yaml:2:1: error: not YAML"),
        ("names: " + "[" * 50_000, "data.yaml:1:27: error: nested deeper than 20 levels"),
        ("names: 1", "names must be a list"),
        ("names: {0: car, 2: boat}", "names must be a list"),
        (
            "names: [yes, no]",
            "names must be a list of class names, or a mapping from 0, 1, ... to them. Correct it; put",
        ),
        ("names: [car, car]", "class names must be there, each once"),
        ("names: []", "class names must be there, each once"),
        ("names: [car]\nnc: 2", "nc does not equal the number of names, 1"),
        ("names: [car]\ntrain: 7", "train must be a path or a list of paths"),
        ("[a]", "the top level must be a mapping"),
        ("x" * 2**19, "bytes are more than the"),
        ("names: [" + "9" * 5000 + "]", "not YAML"),
        ("names: [2020-99-99]", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_unsound_yaml_is_refused(folder: Path, make_repo: Make, text: str, rule: str) -> None:
    (folder / "data.yaml").write_text(text)
    (problem,) = read(folder).problems
    assert rule in str(problem)
    assert not recognise(folder)[0]
    with pytest.raises(ImportRefused) as caught:
        register("harbour", folder, "yolo", repo=make_repo())
    assert rule in str(caught.value)


def test_a_folder_without_names_or_with_several(folder: Path) -> None:
    (folder / "data.yaml").rename(folder / "a.names")
    (folder / "b.names").write_text("car")
    with pytest.raises(
        ImportRefused, match=r"one data.yaml or .names file .*, found a.names, b.names. Add it, or keep"
    ):
        class_names(folder)
    (folder / "a.names").unlink()
    (folder / "b.names").unlink()
    with pytest.raises(ImportRefused, match=r"must hold the class names. Add it"):
        class_names(folder)


def test_names_that_are_no_text_are_refused(folder: Path, paint: Make) -> None:
    (folder / "images/train/a.png").rename(folder / "images/train/a\n.png")
    problems: list[Problem] = read(folder).problems
    assert "1 names of pictures cannot be written down, for example 'images/train/a\\n.png'" in str(problems[0])


def test_a_folder_without_pictures_is_refused(tmp_path: Path, make_repo: Make) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.names").write_text("car\n")
    with pytest.raises(ImportRefused, match=r"(?s)no picture is in any split:.*put no picture into split 'train'"):
        register("harbour", tmp_path / "empty", "yolo", repo=make_repo())

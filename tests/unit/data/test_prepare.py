from __future__ import annotations

import contextlib
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pycocotools.coco import COCO

from data.card import DatasetCard
from data.importing import FORMATS, Format
from data.prepare import prepare
from data.problems import InvalidDataset
from data.reading import READERS

Make = Callable[..., Path]


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _load(folder: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "annotations" / f"{split}.json"))


def _refused(repo: Path) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as caught:
        prepare("tiny", repo)
    return caught.value


def _for_train(change: Callable[[dict[str, Any]], object]) -> Callable[[str, dict[str, Any]], None]:
    return lambda split, document: change(document) and None if split == "train" else None


def test_pycocotools_reads_the_same_boxes_in_card_order(coco_folder: Make, make_repo: Make) -> None:
    folder = prepare("tiny", make_repo(coco_folder()))
    for split in ("train", "val", "test"):
        coco = _load(folder, split)
        assert [(row["id"], row["name"]) for row in coco.loadCats(coco.getCatIds())] == [(1, "car"), (2, "boat")]
        assert [row["id"] for row in coco.dataset["images"]] == [3, 7]
        found = [
            (row["id"], row["image_id"], row["category_id"], row["bbox"], row["area"], row["iscrowd"])
            for row in coco.dataset["annotations"]
        ]
        assert found == [
            (1, 3, 1, [1.25, 2.5, 10.0, 4.0], 40.0, 0),
            (2, 3, 2, [40.0, 20.0, 3.0, 3.0], 9.0, 0),
            (3, 7, 2, [10.0, 5.0, 8.0, 6.0], 30.0, 0),
            (4, 7, 1, [30.0, 20.0, 20.0, 15.0], 250.0, 1),
        ]
        assert [row["ignore_regions_xywh"] for row in coco.dataset["images"]] == [[[0, 0, 9, 5]], []]


def test_images_are_the_owners_bytes_and_separate_files(coco_folder: Make, make_repo: Make) -> None:
    source = coco_folder()
    folder = prepare("tiny", make_repo(source))
    assert _hashes(folder / "images") == _hashes(source / "images")
    assert (folder / "images/train/a.png").stat().st_ino != (source / "images/train/a.png").stat().st_ino


def test_prepared_data_is_a_fixed_point(coco_folder: Make, make_repo: Make) -> None:
    """Preparing again, and preparing what was prepared, give the same bytes."""
    repo = make_repo(coco_folder())
    first = _hashes(prepare("tiny", repo))
    assert _hashes(prepare("tiny", repo)) == first
    link = repo / "data/raw/tiny"
    link.unlink()
    (repo / "data/processed/tiny").rename(repo / "again")
    link.symlink_to(repo / "again")
    assert _hashes(prepare("tiny", repo)) == first


def test_boxes_are_clipped_or_left_out_and_counted(coco_folder: Make, make_repo: Make) -> None:
    def spoil(document: dict[str, Any]) -> None:
        boxes = [[55, 35, 10, 10], [-4, 0, 2, 2], [5, 5, 0, 3], [5, 5, 3, -1], [20, 20, 5, 5]]
        for number, box in enumerate(boxes, start=10):
            document["annotations"].append({"id": number, "image_id": 7, "category_id": 10, "bbox": box, "area": 99})
        document["annotations"][-1]["ignore"] = 1

    coco = _load(prepare("tiny", make_repo(coco_folder(_for_train(spoil)))), "train")
    assert (coco.dataset["info"]["num_boxes_clipped"], coco.dataset["info"]["num_boxes_excluded"]) == (1, 3)
    assert [(row["bbox"], row["area"]) for row in coco.dataset["annotations"]][4:] == [([55, 35, 5, 5], 25)]
    assert coco.dataset["images"][1]["ignore_regions_xywh"] == [[20, 20, 5, 5]]


def test_all_problems_come_at_once(coco_folder: Make, make_repo: Make) -> None:
    def spoil(split: str, document: dict[str, Any]) -> None:
        row = {"id": 50, "image_id": 7, "category_id": 10, "bbox": [1, 1, 2, 2]}
        if split == "train":
            document["annotations"] += [
                row | {"id": 1},
                row | {"id": 51, "category_id": 99},
                row | {"id": 52, "image_id": 99},
                row | {"bbox": [1, float("nan"), 2, 2]},
                row | {"id": True},
            ]
            image = {"width": 60, "height": 40}
            document["images"] += [
                image | {"id": 100, "file_name": "../../secret.png"},
                image | {"id": 101, "file_name": "/etc/passwd"},
                image | {"id": 102, "file_name": "train/absent.png"},
                image | {"id": 3, "file_name": "train/new.png"},
                image | {"id": 103, "file_name": "train/a.png"},
                image | {"id": 104, "file_name": "train/flat.png", "width": 0},
            ]
        elif split == "val":
            document["images"][0]["file_name"] = "train/b.png"
            document["images"][1] |= {"width": 40, "height": 60}
        else:
            document["categories"].append({"id": 10, "name": "cart"})

    source = coco_folder(spoil)
    damaged = source / "images/test/a.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    (source / "images/test/b.png").write_text("not a picture")
    repo = make_repo(source)
    message = str(_refused(repo))
    for part in (
        "annotation id 1 occurs twice",
        "annotation 51: category 99 is not one of the card's classes. Known: car, boat",
        "annotation 52: no sound image has id 99",
        "annotations[7] needs",
        "annotations[8] needs",
        "'../../secret.png' leaves the images folder",
        "'/etc/passwd' leaves the images folder",
        "absent.png: error: the image is missing",
        "image id 3 occurs twice",
        "file_name 'train/a.png' occurs twice",
        "image 104: 'width' and 'height' must be positive",
        "'train/b.png' is in split 'train' too",
        "the image is 60x40 px, its record says 40x60",
        "category id 10 or name 'cart' occurs twice",
        f"{repo / 'data/raw/tiny/images/test/a.png'}: error: the image cannot be decoded",
        f"{repo / 'data/raw/tiny/images/test/b.png'}: error: not an image",
    ):
        assert part in message, part


@pytest.mark.parametrize("text", ["", "[]", '{"images": {}}', "[" * 100_000])
def test_files_that_are_not_coco(coco_folder: Make, make_repo: Make, text: str) -> None:
    source = coco_folder()
    (source / "annotations/val.json").write_text(text)
    assert all(problem.path.name == "val.json" for problem in _refused(make_repo(source)).problems)


def test_a_decompression_bomb_is_not_decoded(coco_folder: Make, make_repo: Make) -> None:
    side = 60_000

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    spoil = _for_train(lambda document: document["images"][0].update(width=side, height=side))
    source = coco_folder(spoil)
    (source / "images/train/b.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert "decompression bomb" in str(_refused(make_repo(source)))


def test_failure_leaves_the_previous_version_and_nothing_else(coco_folder: Make, make_repo: Make) -> None:
    source = coco_folder()
    repo = make_repo(source)
    before = _hashes(prepare("tiny", repo))
    annotations = source / "annotations/test.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"images": []}))
    _refused(repo)
    processed = repo / "data/processed"
    assert _hashes(processed / "tiny") == before
    assert {path.name for path in processed.iterdir()} == {"tiny", ".tiny.lock"}


def test_a_killed_runs_leftovers_are_replaced(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo(coco_folder())
    leftover = repo / "data/processed/.tiny.partial/images"
    leftover.mkdir(parents=True)
    (leftover / "half.png").write_text("half")
    assert "images/half.png" not in _hashes(prepare("tiny", repo))


def test_every_format_of_a_card_can_be_read_and_imported() -> None:
    formats = set(get_args(DatasetCard.model_fields["format"].annotation))
    assert formats == {*READERS, "procedural"}
    assert set(get_args(Format)) == set(FORMATS) == {*READERS, "auto"}

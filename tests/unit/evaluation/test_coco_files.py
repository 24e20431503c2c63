"""COCO JSON that anybody made: what is wrong with it, by file and index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.coco import score
from evaluation.file_problems import BadFiles
from evaluation.protocols import score_by
from evaluation.score_files import ScoreFiles, read_files

DETECTION: dict[str, Any] = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 8, 8], "score": 0.5}


def document(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a/left.jpg", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 8, 8]}],
        **changes,
    }


def read_json(folder: Path, truth: Any, found: Any, sizes: Any = None) -> ScoreFiles:
    """Values are written as JSON, texts as they are."""
    paths = []
    for name, value in (("truth.json", truth), ("found.json", found), ("sizes.json", sizes)):
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        paths.append(folder / name)
    return read_files(paths[0], paths[1], None if sizes is None else paths[2], with_others=False)


def message(folder: Path, truth: Any, found: Any, sizes: Any = None) -> str:
    with pytest.raises(BadFiles) as caught:
        read_json(folder, truth, found, sizes)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ("", [], "truth.json: the file is empty (0 bytes)"),
        (document(), "", "found.json: the file is empty (0 bytes); a file without entries says []"),
        (document(), "null", "found.json: the file holds null alone; a file without entries says []"),
        (document(), '[\n{"a": }]', "found.json:2:7: not JSON: Expecting value"),
        (document(), "[" * 100_000, "found.json: not JSON that can be read: maximum recursion depth exceeded"),
        (document(), "[1" + "0" * 5000 + "]", "found.json: not JSON that can be read: Exceeds the limit"),
        (document(), {"a": 1}, "found.json: a COCO results file is a list of objects with image_id, category_id, bbox"),
        (document(), [3], "found.json: a COCO results file is a list of objects"),
        ([], [], "truth.json: a COCO annotation file is an object with lists of objects in images, annotations, categ"),
        (document(images=[3]), [], "truth.json: a COCO annotation file is an object with lists of objects"),
        (document(images=[{"id": "7"}]), [], "truth.json: images[0]: 'id' must be a whole number, found '7'"),
        (document(images=[{}]), [], "truth.json: images[0]: 'id' must be a whole number, found None"),
        (
            document(images=[{"id": 7}] * 2),
            [],
            "truth.json: 1 problem(s):\n  images[1]: id 7 was used by images[0]; give each its o",
        ),
        (
            document(categories=[{"id": i, "name": n} for i, n in ((1, "a"), (2, "b"), (1, "c"))]),
            [],
            "truth.json: 1 problem(s):\n  categories[2]: id 1 was used by categories[0]; give each its own",
        ),
        (
            document(categories=[{"id": i, "name": n} for i, n in ((1, "a"), (2, "b"), (3, "b"))]),
            [],
            "truth.json: 1 problem(s):\n  categories[2]: name 'b' was used by categories[1]; give each its own",
        ),
        (document(images=[{"id": 7, "width": "5", "height": 5}]), [], "images[0]: 'width' and 'height' must be whole"),
        (
            document(images=[{"id": 7, "width": 5}]),
            [],
            "images[0]: 'width' and 'height' must be whole numbers of pixels",
        ),
        (document(images=[{"id": 7, "file_name": 5}]), [], "images[0]: 'file_name' must be text, found 5"),
        (document(images=[{"id": 7, "ignore_regions_xywh": [1]}]), [], "images[0]: 'ignore_regions_xywh' must list"),
        (
            document(categories=[{"id": 1, "name": "\ud800"}]),
            [],
            "categories[0]: 'name' must be text that can be print",
        ),
        (
            document(annotations=[{**document()["annotations"][0], "id": number} for number in (4, 5, 4, 6, 4)]),
            [],
            "2 problem(s):\n  truth.json: annotations[2]: id 4 was used by annotations[0]; give each its own\n"
            "  truth.json: annotations[4]: id 4 was used by annotations[0]; give each its own",
        ),
        (document(annotations=[{"id": [1]}] * 2), [], "annotations[1]: 'id' must be a whole number, found [1]"),
        (document(annotations=[{"id": 10**30}]), [], "annotations[0]: 'id' must be a whole number, found 10000"),
        (document(annotations=[{"area": None}]), [], "annotations[0]: 'area' must be a number of square pixels"),
        (document(annotations=[{"iscrowd": 3}]), [], "annotations[0]: 'iscrowd' must be 0 or 1, found 3"),
        (document(annotations=[{}]), [], "truth.json: 3 problem(s):\n  annotation 0: image_id None must be a who"),
        (document(), [{**DETECTION, "image_id": 8}], "found.json: 1 problem(s):\n  detection 0: image_id 8 is not in"),
        (
            document(),
            [{**DETECTION, "image_id": [8]}],
            "detection 0: image_id [8] must be a whole number: 1, not 1.0, true or '1'",
        ),
        (
            document(),
            [{**DETECTION, "category_id": 2}],
            "detection 0: category_id 2 is not in the ground truth; known: 1",
        ),
        (document(), [{**DETECTION, "bbox": None}], "detection 0: bbox None must be four finite numbers x, y, w, h"),
        (document(), [{**DETECTION, "bbox": [10**400, 1, 1, 1.5]}], "must be four finite numbers x, y, w, h"),
        (document(), [{**DETECTION, "bbox": [1, 1, 1e200, 1]}], "must be four finite numbers x, y, w, h"),
        (document(), [{**DETECTION, "score": 10**400}], "is no number in 0..1"),
        (document(), [DETECTION, {**DETECTION, "score": 1.5}], "detection 1: score 1.5 is no number in 0..1"),
        (
            document(),
            '[{"image_id": 7, "category_id": 1, "bbox": [1, 1, NaN, 1], "score": 1}]',
            "0: bbox [1, 1, nan, 1]",
        ),
    ],
)
def test_bad_json_is_named(tmp_path: Path, truth: Any, found: Any, expected: str) -> None:
    assert expected in message(tmp_path, truth, found)


@pytest.mark.parametrize("num_sound", [0, 2])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"score": True}, "score True is no number in 0..1"),
        ({"score": False}, "score False is no number in 0..1"),
        ({"image_id": True}, "image_id True must be a whole number"),
        ({"image_id": 7.0}, "image_id 7.0 must be a whole number"),
        ({"category_id": True}, "category_id True must be a whole number"),
        ({"category_id": 1.0}, "category_id 1.0 must be a whole number: 1, not 1.0, true or '1'"),
        ({"bbox": [10, 10, True, 8]}, "bbox [10, 10, True, 8] must be four finite numbers"),
    ],
)
def test_what_only_equals_a_number_is_none(
    tmp_path: Path, num_sound: int, changes: dict[str, Any], expected: str
) -> None:
    truth = document(images=[{"id": 7}, {"id": 1}])
    # Among numbers, and as large as what it equals.
    found = [{**DETECTION, "image_id": 1, **changes}, *[DETECTION] * num_sound]
    assert f"found.json: 1 problem(s):\n  detection 0: {expected}" in message(tmp_path, truth, found)
    annotations = [{"image_id": 7, "category_id": 1, "bbox": [1, 1, 8, 8]} | changes]
    if "score" not in changes:
        assert f"truth.json: 1 problem(s):\n  annotation 0: {expected}" in message(
            tmp_path, document(images=truth["images"], annotations=annotations), []
        )


def test_of_many_categories_the_first_are_said(tmp_path: Path) -> None:
    categories = [{"id": number, "name": f"{number}"} for number in range(25, 0, -1)]
    known = ", ".join(str(number) for number in range(1, 21))
    wrong = [{**DETECTION, "category_id": 26}]
    assert message(tmp_path, document(categories=categories), wrong).endswith(
        f"detection 0: category_id 26 is not in the ground truth; known: {known} and 5 more"
    )
    none = message(tmp_path, document(categories=[], annotations=[]), wrong)
    assert none.endswith("detection 0: category_id 26 is not in the ground truth; known: none")
    assert message(tmp_path, document(categories=categories[5:]), wrong).endswith(f"known: {known}")


def test_problems_of_both_files_come_together(tmp_path: Path) -> None:
    bad = document(annotations=[{"image_id": 9, "category_id": 1, "bbox": [1, 1, 1, 1]}])
    both = message(tmp_path, bad, [{**DETECTION, "score": 2}])
    assert "truth.json: 1 problem(s):\n  annotation 0: image_id 9" in both
    assert "found.json: 1 problem(s):\n  detection 0: score 2" in both


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], "sizes.json: image sizes are an object of names with [width, height]"),
        ({"left": [1]}, "sizes.json: 'left': a size is [width, height] in whole pixels"),
        ({"left": [0, 5]}, "a size is [width, height] in whole pixels"),
        ({"left": ["a", 5]}, "a size is [width, height] in whole pixels"),
        ("", "sizes.json: the file is empty"),
    ],
)
def test_bad_image_sizes_are_named(tmp_path: Path, sizes: Any, expected: str) -> None:
    assert expected in message(tmp_path, document(), [], sizes)


def test_corners_instead_of_width_and_height_are_told(tmp_path: Path) -> None:
    corners = [{**DETECTION, "bbox": [x, 60, x + 8, 70]} for x in (5, 30, 50, 90)]
    rule = "100% of the boxes reach beyond their image as x, y, w, h and fit as x1, y1, x2, y2, the first is"
    remedy = "; write x, y, width, height"
    assert f"found.json: {rule} found.json: detection 0{remedy}" in message(tmp_path, document(), corners)
    annotations = [{**row, "id": number} for number, row in enumerate(corners)]
    assert f"truth.json: {rule} truth.json: annotations[0]{remedy}" in message(
        tmp_path, document(annotations=annotations), [DETECTION]
    )
    # Boxes that only stick out are no sign of it.
    assert read_json(tmp_path, document(), [{**DETECTION, "bbox": [2, 2, 104, 84]}]).notes == ()


def test_a_part_of_the_boxes_as_corners_is_told_and_most_of_them_are_refused(tmp_path: Path) -> None:
    def found(num_corners: int) -> list[dict[str, Any]]:
        return [DETECTION] * (1000 - num_corners) + [{**DETECTION, "bbox": [60, 20, 70, 30]}] * num_corners

    assert read_json(tmp_path, document(), found(99)).notes == ()
    rule = "of the boxes reach beyond their image as x, y, w, h and fit as x1, y1, x2, y2"
    for num_corners in (100, 500):
        (note,) = read_json(tmp_path, document(), found(num_corners)).notes
        place = f"{tmp_path}/found.json: detection {1000 - num_corners}"
        assert note == f"{num_corners // 10}% {rule}, the first is {place}: see that all are x, y, w, h"
    annotations = [{**row, "id": number} for number, row in enumerate(found(500))]
    assert (
        f"{tmp_path}/truth.json: annotations[500]: see"
        in read_json(tmp_path, document(annotations=annotations), [DETECTION]).notes[0]
    )
    assert message(tmp_path, document(), found(501)) == (
        f"1 problem(s):\n  found.json: 50% {rule}, the first is found.json: detection 499; write x, y, width, height"
    )


def test_rows_before_columns_are_told_where_the_image_shows_it(tmp_path: Path) -> None:
    turned = [{**DETECTION, "bbox": [y, x, 8, 6]} for y, x in ((10, 85), (40, 90), (60, 10), (5, 5))]
    as_it_should = {**DETECTION, "bbox": [90, 60, 8, 6]}
    (note,) = read_json(tmp_path, document(), [*turned, as_it_should]).notes
    rule = "of the boxes reach beyond their image as x, y, w, h and fit as y, x, h, w, the first is"
    assert note == f"40% {rule} {tmp_path}/found.json: detection 0: see that all are x, y, w, h"
    # All of them make sense that way, half of them in no other.
    assert message(tmp_path, document(), turned) == (
        f"1 problem(s):\n  found.json: 50% {rule} found.json: detection 0; write x, y, width, height"
    )
    # The only object, 90 px from the left, does not show that the image is no higher than 18.
    flat = {**document()["annotations"][0], "bbox": [10, 10, 80, 8]}
    without_size = document(images=[{"id": 7}], annotations=[flat])
    assert read_json(tmp_path, without_size, turned[:1]).notes == ()
    # Of a square image nothing shows it.
    square = document(images=[{"id": 7, "width": 100, "height": 100}])
    assert read_json(tmp_path, square, turned).notes == ()


def test_a_file_of_corners_is_refused_also_where_few_of_them_reach_beyond(tmp_path: Path) -> None:
    corners = [{**DETECTION, "bbox": [x, x, x + 8, x + 8]} for x in (5, 10, 20, 30, 60)]
    assert "found.json: 20% of the boxes reach beyond" in message(tmp_path, document(), corners)
    others = [{**DETECTION, "bbox": [20, 20, 8, 8]}]
    assert read_json(tmp_path, document(), corners + others)[2][0].startswith("17% of the boxes reach beyond")


def test_objects_marked_ignore_are_told_to_count_all_the_same(tmp_path: Path) -> None:
    annotation = document()["annotations"][0]
    marks = [{}, {"ignore": 0}, {"ignore": 1}, {"ignore": 1, "iscrowd": 1}, {"ignore": 1}]
    annotations = [{**annotation, **mark, "id": number} for number, mark in enumerate(marks)]
    read = read_json(tmp_path, document(annotations=annotations), [DETECTION])
    assert read.notes == (
        f"2 objects are marked ignore: 1, the first is {tmp_path}/truth.json: annotations[2]: as in pycocotools they "
        "count as any other; iscrowd: 1 is what lets detections on them count neither way",
    )
    assert score_by("coco", read.tables).counts["num_ground_truths"] == 4


@pytest.mark.parametrize(
    ("side", "is_told"), [(69, False), (70, False), (71, True), (100, True), (110, True), (111, False)]
)
def test_corners_reach_a_tenth_beyond_the_image_and_lie_in_it_but_for_a_tenth(
    tmp_path: Path, side: int, is_told: bool
) -> None:
    # The image is 100 wide: 40 + 70 is a tenth beyond.
    found = [DETECTION, {**DETECTION, "bbox": [40, 20, side, 30]}]
    assert bool(read_json(tmp_path, document(), found).notes) == is_told


def test_coco_files_score_as_the_dicts_do(tmp_path: Path) -> None:
    files = read_json(tmp_path, document(), [DETECTION], {"left": [5, 5]})
    assert files.tables.image_sizes_px.tolist() == [[100, 80]]
    assert (files.counts, files.notes) == ({}, ())
    scored, expected = (
        score_by("coco", files.tables, max_dets=3), score(document(), [DETECTION], max_dets=3, ignore_rule="none")
    )  # fmt: skip
    assert scored[:3] == expected[:3]
    without = document(images=[{"id": 7, "file_name": "a/left.jpg"}])
    assert read_json(tmp_path, without, [], {"left": [5, 6]}).tables.image_sizes_px.tolist() == [[5, 6]]
    with pytest.raises(ValueError, match="max_dets is 0"):
        score_by("coco", files.tables, max_dets=0)
    assert score_by("voc", read_json(tmp_path, document(), []).tables).metrics["voc/mAP50"] == 0

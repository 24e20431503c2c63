"""Files that anybody made: what is read, what is refused and with which words, and that nothing escapes as a fault."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.file_problems import BadFiles
from evaluation.protocols import PROTOCOLS, NoClasses, score_by
from evaluation.score_files import ScoreFiles, read_files
from evaluation.uavdt import NO_CLASS
from evaluation.visdrone import UnknownImageSize

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


COCO = {
    "truth.json": """{"images": [{"id": 7, "width": 99, "height": 80, "ignore_regions_xywh": [[50, 50, 20, 20]]}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 8, 8]}]}""",
    "found.json": """[{"image_id": 7, "category_id": 1, "bbox": [10, 10, 8, 8], "score": 0.5},
        {"image_id": 7, "category_id": 1, "bbox": [52, 52, 8, 8], "score": 0.25}]""",
}
VISDRONE = {
    "annotations/a.txt": "10,10,8,8,1,4,0,0\n30,30,20,20,0,0,0,0,\n50,50,6,6,1,11,0,0\n",
    "annotations/b.txt": "",
    "detections/a.txt": "10.5,10,8,8,0.9,4,-1,-1\n51,50,6,6,0.4,11,-1,-1\n",
    "detections/b.txt": "5,5,9,9,0.25,1,-1,-1\n",
}
UAVDT = {
    "GT/M0209_gt_whole.txt": "1,1,10,10,20,20,1,1,1\n3,1,14,10,20,20,1,1,2\n",
    "GT/M0209_gt_ignore.txt": "2,1,60,60,40,40,1,-1,-1\n",
    "GT/M1004_gt_whole.txt": "5,1,10,10,20,20,1,1,3\n",
    "GT/M1004_gt_ignore.txt": "",
    "found/M0209.txt": "3,-1,14,10,20,20,0.75,1,2\n1,-1,10,10,20,20,0.5,1,1\n4,-1,1,1,9,9,0.25,1,1\n",
    "found/M1004.txt": "",
}


def read_visdrone(
    folder: Path, files: dict[str, str], sizes: Path | None = None, *, with_others: bool = True
) -> ScoreFiles:
    write(folder, VISDRONE | files)
    return read_files(folder, folder / "detections", sizes, with_others=with_others)


def read_uavdt(folder: Path, files: dict[str, str]) -> ScoreFiles:
    write(folder, UAVDT | files)
    return read_files(folder, folder / "found", None, with_others=False)


def read_coco(folder: Path) -> ScoreFiles:
    write(folder, COCO)
    return read_files(folder / "truth.json", folder / "found.json", None, with_others=False)


def message(reading: Any, folder: Path, *arguments: Any, **options: Any) -> str:
    with pytest.raises(BadFiles) as caught:
        reading(folder, *arguments, **options)
    return str(caught.value).replace(f"{folder}/", "")


def test_visdrone_rows_are_read_as_they_are(tmp_path: Path) -> None:
    tables = read_visdrone(tmp_path, {}).tables
    assert tables.file_names == ("a.jpg", "b.jpg")
    assert tables.class_names[3] == "car"
    assert tables.class_names[10] == "others"
    assert tables.truths.image.tolist() == [0, 0]
    assert tables.truths.label.tolist() == [3, 10]
    assert tables.truths.areas_px.tolist() == [64, 36]
    assert [regions.tolist() for regions in tables.ignore_regions_xywh_px] == [[[30, 30, 20, 20]], []]
    assert tables.detections.image.tolist() == [0, 0, 1]
    assert tables.detections.label.tolist() == [3, 10, 0]
    assert tables.detections.scores.tolist() == [0.9, 0.4, 0.25]
    assert tables.detections.boxes_xywh_px[0].tolist() == [10.5, 10, 8, 8]


def test_others_are_left_out_and_counted_but_for_visdrone_itself(tmp_path: Path) -> None:
    files = read_visdrone(tmp_path, {}, with_others=False)
    assert files.counts == {"num_others_ground_truths": 1, "num_others_detections": 1}
    assert len(files.tables.class_names) == len(files.tables.class_ids) == 10
    assert files.tables.detections.label.tolist() == [3, 0]


def test_sizes_come_from_the_file_or_from_the_pictures(tmp_path: Path) -> None:
    assert read_visdrone(tmp_path, {}).tables.image_sizes_px.tolist() == [[0, 0], [0, 0]]
    (tmp_path / "sizes.json").write_text('{"b": [70, 50], "c": [1, 1]}')
    assert read_visdrone(tmp_path, {}, tmp_path / "sizes.json").tables.image_sizes_px.tolist() == [[0, 0], [70, 50]]
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((64, 96, 3), np.uint8))
    both = read_visdrone(tmp_path, {}, tmp_path / "sizes.json").tables
    assert both.image_sizes_px.tolist() == [[96, 64], [70, 50]]
    annotations = tmp_path / "annotations"
    assert read_files(annotations, tmp_path / "detections", None, with_others=True).tables.image_sizes_px[0, 0] == 96
    (tmp_path / "images/b.jpg").write_text("no picture")
    assert "images/b.jpg: not an image" in message(read_visdrone, tmp_path, {})


def test_uavdt_frames_become_images_and_its_unread_files_are_data_of_the_protocol(tmp_path: Path) -> None:
    files = read_uavdt(tmp_path, {})
    tables = files.tables
    assert files.notes[1:] == (
        f"1 detections are in frames that have no row of ground truth, the first is {tmp_path}/found/M0209.txt:3, and "
        "count as false positives: see that both number the frames alike",
    )
    assert tables.file_names == tuple(f"{name}.jpg" for name in (
        "M0209/img000001", "M0209/img000002", "M0209/img000003", "M0209/img000004", "M1004/img000005",
    ))  # fmt: skip
    assert tables.truths.image.tolist() == [0, 2, 4]
    assert tables.truths.label.tolist() == [0, 1, 2]
    assert tables.detections.image.tolist() == [2, 0, 3]
    assert tables.ignore_regions_xywh_px[1].tolist() == [[60, 60, 40, 40]]
    (tmp_path / "sizes.json").write_text('{"M0209": [90, 50]}')
    sized = read_files(tmp_path / "GT", tmp_path / "found", tmp_path / "sizes.json", with_others=False).tables
    assert sized.image_sizes_px.tolist() == [[90, 50]] * 4 + [[0, 0]]


def test_detections_without_a_class_are_for_uavdt_alone(tmp_path: Path) -> None:
    files = read_uavdt(tmp_path, {"found/M0209.txt": "3,-1,14,10,20,20,0.75,1,-1\n"})
    assert files.tables.detections.label.tolist() == [NO_CLASS]
    assert files.notes[1:] == ("the detections have no class (column 9 is -1): class-aware numbers are left out",)
    assert score_by("uavdt", files.tables).metrics == {"uavdt/AP70": pytest.approx(1 / 3)}
    for name in PROTOCOLS:
        if name != "uavdt":
            with pytest.raises(NoClasses, match=f"protocol '{name}' needs it: give one, or score by uavdt"):
                score_by(name, files.tables)
    mixed = {"found/M0209.txt": "3,-1,14,10,20,20,0.75,1,-1\n3,-1,14,10,20,20,0.75,1,2\n"}
    assert "found: 1 of 2 detections have class -1 in column 9; give all" in message(read_uavdt, tmp_path, mixed)


def test_every_protocol_scores_every_format(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text('{"a": [100, 100], "b": [100, 100]}')
    for name in PROTOCOLS:
        files = read_visdrone(tmp_path, {}, tmp_path / "sizes.json", with_others=name == "visdrone")
        for tables in (files.tables, read_coco(tmp_path / "coco").tables):
            scored = score_by(name, tables, ignore_rule="covered-half")
            assert scored.metrics
            assert all(metric.startswith(f"{name}/") for metric in scored.metrics)
            assert all(value is None or 0 <= value <= 1 for value in scored.metrics.values())
    tables = read_uavdt(tmp_path / "u", {}).tables
    with pytest.raises(UnknownImageSize, match=r"'M0209/img000002.jpg'; the protocol needs it: add"):
        score_by("visdrone", tables)


def test_no_detections_in_any_format(tmp_path: Path) -> None:
    empty = read_visdrone(tmp_path, {"detections/a.txt": "", "detections/b.txt": "\n"})
    assert score_by("coco", empty.tables).metrics["coco/AP"] == 0
    assert score_by("uavdt", read_uavdt(tmp_path / "u", {"found/M0209.txt": ""}).tables).metrics["uavdt/AP70"] == 0


def test_objects_without_a_size_stay_and_are_told(tmp_path: Path) -> None:
    files = read_visdrone(tmp_path, {"annotations/b.txt": "5,5,9,9,1,1,0,0\n5,5,-9,0,1,1,0,0\n"})
    assert files.notes[0].startswith("1 objects have no width or no height, the first in b.jpg")
    assert files.tables.truths.areas_px.min() == 0
    scored = score_by("coco", files.tables)
    assert scored.per_class["pedestrian"]["num_ground_truths"] == 2
    assert scored.per_class["pedestrian"]["coco/AR"] == 0.5


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"detections/a.txt": "1,2,3,4,0.5,1,-1\n"},
            "detections/a.txt:1: a row has 8 columns (x,y,w,h,score,category,",
        ),
        (
            {"detections/a.txt": "1,2,3,nan,0.5,1,-1,-1"},
            "a.txt:1: h in column 4 must be a finite number up to 1e+12 in si",
        ),
        ({"detections/a.txt": "\n1,2,inf,4,0.5,1,-1,-1"}, "a.txt:2: w in column 3 must be a finite number up to 1e+12"),
        ({"detections/a.txt": "1,2,1e300,4,0.5,1,-1,-1"}, "must be a finite number up to 1e+12 in size, found '1e300'"),
        ({"detections/a.txt": "1,2,0,4,0.5,1,-1,-1"}, "a.txt:1: box [1.0, 2.0, 0.0, 4.0] (x, y, w, h) must have w > 0"),
        (
            {"detections/a.txt": "1,2,3,4,50,1,-1,-1"},
            "a.txt:1: score 50 is outside 0..1; divide scores in percent by 1",
        ),
        ({"detections/a.txt": "1,2,3,4,-.1,1,-1,-1"}, "a.txt:1: score -0.1 is outside 0..1"),
        ({"detections/a.txt": "1,2,3,4,0.5,12,-1,-1"}, "a.txt:1: category 12 must be one of 1, 2, 3, 4, 5, 6, 7, 8,"),
        ({"detections/a.txt": "1,2,3,4,0.5,1.5,-1,-1"}, "category 1.5 must be one of"),
        ({"annotations/a.txt": "1,2,3,4,1,12,0,0"}, "annotations/a.txt:1: category 12 must be one of 0, 1, 2, 3,"),
        (
            {"annotations/c.txt": ""},
            "detections/c.txt: the file is missing, and image 'c' is in the ground truth; an em",
        ),
        (
            {"detections/c.txt": ""},
            "detections/c.txt: there is no image 'c' in annotations; add its ground truth, or re",
        ),
    ],
)
def test_bad_visdrone_files_are_named(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    found = message(read_visdrone, tmp_path, files)
    assert found.startswith("1 problem(s):\n")
    assert expected in found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"found/M1004.txt": "1,-1,1,1,5,5,0.5,1\n"},
            "found/M1004.txt:1: a row has 9 columns (frame,-1,x,y,w,h,score,",
        ),
        ({"found/M1004.txt": "1,-1,1,1,5,5,2,1,1\n"}, "found/M1004.txt:1: score 2 is outside 0..1"),
        ({"found/M1004.txt": "1,-1,1,1,5,-5,1,1,1\n"}, "box [1.0, 1.0, 5.0, -5.0] (x, y, w, h) must have w > 0 and h"),
        ({"found/M1004.txt": "0,-1,1,1,5,5,1,1,1\n"}, "found/M1004.txt:1: frame 0 must be a whole number from 1"),
        ({"found/M1004.txt": "1.5,-1,1,1,5,5,1,1,1\n"}, "frame 1.5 must be a whole number from 1"),
        ({"found/M1004.txt": "1,-1,1,1,5,5,1,1,4\n"}, "category 4 must be one of -1, 1, 2, 3"),
        (
            {"GT/M1004_gt_whole.txt": "1,1,1,1,5,5,1,1,0\n"},
            "GT/M1004_gt_whole.txt:1: category 0 must be one of 1, 2, 3",
        ),
        (
            {"GT/M1004_gt_whole.txt": "5,1,1,1,5,5,1,1,3\n\n5,2,1,1,5,5,1,1,3\n6,1,1,1,5,5,1,1,3\n5,1,9,9,5,5,1,1,2\n"},
            "GT/M1004_gt_whole.txt:5: frame 5 has id 1 in line 1 already; give every object of a frame its own, or d",
        ),
        ({"GT/M1004_gt_ignore.txt": "1,1\n"}, "GT/M1004_gt_ignore.txt:1: a row has 9 columns"),
        ({"found/M0101.txt": ""}, "found/M0101.txt: there is no sequence 'M0101' in GT"),
        ({"GT/M0101_gt_whole.txt": ""}, "found/M0101.txt: the file is missing, and sequence 'M0101' is in"),
    ],
)
def test_bad_uavdt_files_are_named(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    found = message(read_uavdt, tmp_path, files)
    assert found.startswith("1 problem(s):\n")
    assert expected in found


def test_a_link_to_nothing_is_no_empty_file_and_hidden_files_are_none(tmp_path: Path) -> None:
    write(tmp_path, VISDRONE | {"annotations/._a.txt": "x", "detections/._b.txt": "x"})
    read_files(tmp_path, tmp_path / "detections", None, with_others=True)
    (tmp_path / "detections/a.txt").unlink()
    (tmp_path / "detections/a.txt").symlink_to(tmp_path / "absent")
    assert message(read_files, tmp_path, tmp_path / "detections", None, with_others=True) == (
        "1 problem(s):\n  detections/a.txt: the file is missing"
    )
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/._a.txt").write_text("")
    with pytest.raises(BadFiles, match="holds no ground truth"):
        read_files(tmp_path / "hidden", tmp_path / "detections", None, with_others=True)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    write(tmp_path, VISDRONE)
    (tmp_path / "detections/a.txt").write_bytes(b"\xff\xfe1,2")
    with pytest.raises(BadFiles, match=r"detections/a.txt: not a text file in UTF-8"):
        read_files(tmp_path, tmp_path / "detections", None, with_others=True)


def test_a_long_list_is_cut_but_counted(tmp_path: Path) -> None:
    rows = "1,2,3,4,9,1,-1,-1\n"
    many = message(read_visdrone, tmp_path, {"detections/a.txt": rows * 30, "detections/b.txt": rows * 5})
    assert many.startswith("35 problem(s):\n  detections/a.txt:1: score 9")
    assert many.endswith(
        "detections/a.txt:20: score 9 is outside 0..1; divide scores in percent by 100\n  ... and 15 more"
    )


def test_what_is_no_known_format_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, VISDRONE | COCO)

    def read(folder: Path, truth: str, found: str) -> ScoreFiles:
        return read_files(folder / truth, folder / found, None, with_others=True)

    assert "empty: holds no ground truth; known are a COCO JSON file; a folder" in message(
        read, tmp_path, "empty", "detections"
    )
    assert "absent: is neither a file nor a folder; known are" in message(read, tmp_path, "absent", "detections")
    assert "absent: there is no such folder; the ground truth is a folder" in message(
        read, tmp_path, "annotations", "absent"
    )
    assert "detections: there is no such file; the ground truth is a file" in message(
        read, tmp_path, "truth.json", "detections"
    )
    assert "found.json: there is no such folder" in message(read, tmp_path, "annotations", "found.json")


def test_corners_are_told_without_a_size_too(tmp_path: Path) -> None:
    rule = "100% of the boxes reach beyond their image as x, y, w, h and fit as x1, y1, x2, y2, the first is "
    # UAVDT says no size: as far as the ground truth reaches.
    wide = {
        "GT/M1004_gt_whole.txt": "5,1,900,400,100,100,1,1,3\n",
        "found/M0209.txt": "3,-1,814,310,850,350,0.75,1,2\n",
    }
    assert f"found: {rule}found/M0209.txt:1; write x, y, width, height" in message(read_uavdt, tmp_path, wide)


def test_the_first_box_that_may_be_corners_is_told_by_its_line(tmp_path: Path) -> None:
    write(tmp_path, {"sizes.json": '{"a": [100, 100], "b": [100, 100]}'})
    files = {
        "annotations/b.txt": "5,5,90,90,0,0,0,0\n\n10,10,8,8,1,4,0,0\n60,20,70,30,1,4,0,0\n10,10,8,8,1,4,0,0\n",
        "detections/b.txt": "\n5,5,9,9,0.25,1,-1,-1\n\n60,20,70,30,0.25,1,-1,-1\n",
    }
    notes = read_visdrone(tmp_path, files, tmp_path / "sizes.json").notes
    assert [note.split(", the first is ")[1].partition(": see")[0] for note in notes] == [
        f"{tmp_path}/annotations/b.txt:4", f"{tmp_path}/detections/b.txt:4"
    ]  # fmt: skip
    (tmp_path / "u").mkdir()
    (note, _) = read_uavdt(tmp_path / "u", {
        "GT/M1004_gt_whole.txt": "5,1,900,400,100,100,1,1,3\n",
        "found/M1004.txt": "5,-1,900,400,100,100,1,1,3\n\n5,-1,814,310,850,350,0.75,1,2\n",
    }).notes  # fmt: skip
    assert f", the first is {tmp_path}/u/found/M1004.txt:3: see that all are x, y, w, h" in note


def test_ignore_regions_of_no_sequence_are_told(tmp_path: Path) -> None:
    files = {f"GT/M{number}_gt_ignore.txt": "1,1,60,60,40,40,1,-1,-1\n" for number in (1305, 1303, 1004)}
    assert read_uavdt(tmp_path, files).notes[2:] == (
        "2 files of ignore regions are not used, their sequences have no *_gt_whole.txt: "
        "M1303_gt_ignore.txt, M1305_gt_ignore.txt",
    )


TEXTS = [
    *("", "1", "-1", "0", "nan", "1e999", "1e300", "-", "x", ",", "\n", "\x00", "9" * 400, "é", "[", "{", "}", "]"),
    *('"', ":", "null", "true", "1.5", " ", "\\ud800", "\t"),
]


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_done_to_the_files_is_scored_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["coco", "visdrone", "uavdt"]))
    files = {"coco": COCO, "visdrone": VISDRONE, "uavdt": UAVDT}[kind]
    place = tmp_path / kind
    write(place, files)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(files)))
        text = (place / name).read_text()
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        changed = text[:start] + data.draw(st.sampled_from(TEXTS)) + text[end:]
        (place / name).write_bytes(changed.encode())
    truth, found = {
        "coco": (place / "truth.json", place / "found.json"),
        "visdrone": (place, place / "detections"),
        "uavdt": (place / "GT", place / "found"),
    }[kind]
    protocol = data.draw(st.sampled_from(list(PROTOCOLS)))
    try:
        tables = read_files(truth, found, None, with_others=protocol == "visdrone").tables
        values = list(score_by(protocol, tables, ignore_rule="covered-half").metrics.values())
    except (BadFiles, NoClasses, UnknownImageSize) as refused:
        # It can be printed.
        str(refused).encode()
        values = []
    assert all(value is None or 0 <= value <= 1 for value in values)


def test_the_fixture_in_coco_terms_equals_pycocotools() -> None:
    folder = SHARED / "visdrone_small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the evaluation fixtures are not part of the project")
    expected = json.loads((folder / "expected.json").read_text())
    files = read_files(folder, folder / "detections", folder / "image_sizes.json", with_others=False)
    plain, aitod = expected["coco_plain"], expected["aitod"]["closed"]["results"]
    assert len(files.tables.truths.label) == plain["annotations"]
    assert len(files.tables.detections.label) == plain["detections"]
    for protocol, max_dets, known in (
        ("coco", 100, plain["maxdets_100"]),
        ("coco", 500, plain["maxdets_500"]),
        ("aitod", None, aitod),
    ):
        scored = score_by(protocol, files.tables, max_dets=max_dets)  # type: ignore[arg-type]
        values = {f"AP_{size}": known[size]["AP"] for size in known if size != "all"}
        values |= {name: known["all"][name] for name in ("AP", "AP50", "AP75")}
        values |= {f"AR_{limit}": value for limit, value in known["all"]["AR"].items()}
        last = list(known["all"]["AR"])[-1]
        values |= {f"AR_{size}": known[size]["AR"][last] for size in known if size != "all"}
        found = {name.partition("/")[2]: 100 * (value or 0) for name, value in scored.metrics.items()}
        assert found == pytest.approx(values, abs=1e-9, rel=0)
        per_class = [100 * (row[f"{protocol}/AP"] or 0) for row in scored.per_class.values()]
        assert per_class == pytest.approx(list(known["all"]["per_class_AP"].values()), abs=1e-9, rel=0)


def test_a_sequence_without_ignore_regions_and_a_set_without_objects_or_detections_are_told(tmp_path: Path) -> None:
    files = {"GT/M0208_gt_whole.txt": "1,1,10,10,20,20,1,1,1\n", "found/M0208.txt": ""}
    told = [note for note in read_uavdt(tmp_path / "a", files).notes if "no *_gt_ignore.txt" in note]
    assert told == ["1 sequences have no *_gt_ignore.txt, so no region of theirs is ignored: M0208"]
    nothing = {"GT/M1004_gt_whole.txt": "", "GT/M0209_gt_whole.txt": "", "found/M1004.txt": "", "found/M0209.txt": ""}
    notes = read_uavdt(tmp_path / "b", nothing).notes
    assert "the ground truth has no object: there is nothing to find" in notes
    assert "there is no detection: nothing is found" in notes

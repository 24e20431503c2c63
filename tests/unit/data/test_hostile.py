"""Label files that are meant to hurt: each is an error with its place, never an exception, a hang or a full memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.label_files import MAX_LABEL_BYTES, is_safe_name, number, read_rows, whole
from data.reading import read_raw
from data.records import Split
from data.splits import SplitRule
from data.yaml_file import UnreadableYaml, read_mapping

Make = Callable[..., Path]
CLASSES = ("car", "boat")


def errors(format: str, folder: Path) -> list[str]:
    problems = read_raw(format, folder, CLASSES, SplitRule()).problems
    return [str(problem) for problem in problems if problem.severity == "error"]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("table", "values", "rule"),
    [
        ("annotations", {"bbox": [0, 0, 10**400, 1]}, "needs an integer 'id' and a 'bbox' of 4 finite numbers"),
        ("annotations", {"bbox": [0, 0, float("inf"), 1]}, "needs an integer 'id' and a 'bbox' of 4 finite numbers"),
        ("annotations", {"bbox": nested(900)}, "needs an integer 'id' and a 'bbox' of 4 finite numbers"),
        ("annotations", {"id": 10**400}, "needs an integer 'id' and a 'bbox' of 4 finite numbers"),
        ("annotations", {"category_id": nested(200)}, "category [[["),
        ("annotations", {"image_id": nested(200)}, "no sound image has id [[["),
        (
            "annotations",
            {"image_id": {"a": "x" * 10**6}},
            "no sound image has id {'a': 'xxxxxxxxxxxx...xxxxxxxxxxxxx'}",
        ),
        ("images", {"width": 10**400}, "'width' and 'height' must be positive integers up to 65535"),
        ("images", {"height": 70_000}, "'width' and 'height' must be positive integers up to 65535"),
        ("images", {"width": float("nan")}, "'width' and 'height' must be positive integers up to 65535"),
        ("images", {"file_name": "\ud800.png"}, r"file_name '\ud800.png' leaves the images folder"),
        ("images", {"file_name": "a\n.png"}, r"file_name 'a\n.png' leaves the images folder"),
        ("images", {"file_name": "../../a.png"}, "file_name '../../a.png' leaves the images folder"),
        ("images", {"file_name": "x" * 5000}, "the image cannot be read: [Errno 36] File name too long"),
        ("images", {"ignore_regions_xywh": [[0, 0, 10**400, 1]]}, "'ignore_regions_xywh' must list [x, y, w, h]"),
        ("categories", {"name": nested(900)}, "needs an integer 'id' and a 'name'"),
    ],
)
def test_coco_values(coco_folder: Make, table: str, values: dict[str, Any], rule: str) -> None:
    def spoil(split: str, document: dict[str, Any]) -> None:
        if split == "train":
            document[table][0] |= values

    assert any(rule in error for error in errors("coco", coco_folder(spoil)))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"[" * 10**6, "not JSON"),
        (b'{"a": ' * 10**5, "not JSON"),
        (b'{"images": [' + b"9" * 5000 + b"]}", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b'{"images": [],\n "annotations": }', "train.json:2:17: error: not JSON: Expecting value"),
        (b"", "train.json:1:1: error: not JSON"),
    ],
)
def test_coco_files(coco_folder: Make, data: bytes, rule: str) -> None:
    folder = coco_folder()
    (folder / "annotations/train.json").write_bytes(data)
    assert rule in errors("coco", folder)[0]


VOC = (
    "<annotation><size><width>{width}</width><height>40</height></size>"
    "<object><name>car</name><bndbox>{box}</bndbox></object></annotation>"
)
BOX = "<xmin>{}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"


@pytest.fixture
def voc_folder(tmp_path: Path, paint: Make) -> Path:
    for split in ("train", "val", "test"):
        paint(tmp_path / f"images/{split}.png")
        for name, text in (
            (f"annotations/{split}.xml", VOC.format(width=60, box=BOX.format(1))),
            (f"splits/{split}.txt", split),
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (VOC.format(width="1e308", box=""), "whole pixels from 1 to 65535"),
        (VOC.format(width="9" * 400, box=""), "whole pixels from 1 to 65535"),
        (VOC.format(width="nan", box=""), "whole pixels from 1 to 65535"),
        (VOC.format(width="60", box=BOX.format("1e999")), "four numbers in its bndbox"),
        (VOC.format(width="60", box=BOX.format("1_0")), "four numbers in its bndbox"),
        (VOC.format(width="60", box=BOX.format("\u0661")), "four numbers in its bndbox"),
        ("<annotation>" + "<a>" * 10**5, "train.xml:1:300013: error: not XML"),
        ("<annotation>" + " " * MAX_LABEL_BYTES, "bytes are more than the 2097152"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>', "not allowed"),
        ("<annotation>\n<a></b></annotation>", "train.xml:2:6: error: not XML"),
    ],
)
def test_voc_files(voc_folder: Path, text: str, rule: str) -> None:
    assert errors("voc", voc_folder) == []
    (voc_folder / "annotations/train.xml").write_text(text)
    (error,) = errors("voc", voc_folder)
    assert rule in error


def test_pipes_in_place_of_files_do_not_hang(voc_folder: Path, coco_folder: Make) -> None:
    folder = coco_folder()
    for path in (voc_folder / "annotations/train.xml", voc_folder / "splits/val.txt", folder / "annotations/val.json"):
        path.unlink()
        os.mkfifo(path)
    assert ["not a regular file" in error for error in errors("voc", voc_folder)] == [True, True]
    assert "not a regular file" in errors("coco", folder)[0]


def test_merge_keys_and_aliases_never_expand(tmp_path: Path) -> None:
    """Nine levels of nine references are 400 million values."""
    lines = ["a0: &a0 {k: v}"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "data.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UnreadableYaml, match="anchors, aliases and tags"):
        read_mapping(path)


@given(st.text(alphabet="ab/.\\\0\n\ud800\x85", max_size=12))
def test_safe_names_stay_below_their_folder(name: str) -> None:
    if is_safe_name(name):
        assert os.path.normpath(os.path.join("/root/images", name)).startswith("/root/images")
        name.encode("utf-8")
        assert name.isprintable()


@given(st.text(max_size=8) | st.floats().map(repr) | st.integers().map(str))
def test_numbers_are_finite_or_refused(text: str) -> None:
    value = number(text)
    assert value is None or (abs(value) < float("inf") and float(text) == value)
    exact = whole(text)
    assert exact is None or (exact == value and abs(exact) < 2**53)


@given(st.lists(st.lists(st.sampled_from(["1", "-2.5", "x", ""]), min_size=2, max_size=9), max_size=5), st.data())
def test_rows_know_their_columns(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], data: st.DataObject
) -> None:
    """The text at a field's line and column is the field."""
    pad = st.sampled_from(["", " ", "\t "])
    lines = [",".join(data.draw(pad) + text + data.draw(pad) for text in row) for row in rows]
    path = tmp_path_factory.mktemp("rows") / "a.txt"
    path.write_text("\n".join(lines))
    for row in read_rows(path, "comma"):
        fields = rows[row.line - 1]
        assert [field.text for field in row.fields] == (fields if fields[-1] else fields[:-1])
        for column, text in row.fields:
            assert lines[row.line - 1][column - 1 :].startswith(text)


def test_json_of_a_problem_has_its_column(coco_folder: Make) -> None:
    from dataclasses import asdict

    folder = coco_folder()
    (folder / "annotations/train.json").write_text("{")
    (problem, *_) = read_raw("coco", folder, CLASSES, SplitRule()).problems
    content = json.loads(json.dumps(asdict(problem), default=str))
    assert (content["line"], content["column"], content["severity"]) == (1, 2, "error")


def test_problems_beyond_all_bounds_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.records._MAX_PROBLEMS", 3)
    content = Split()
    for line in range(1, 8):
        content.warn(tmp_path / "a", "rule", "remedy", line=line)
    content.report(tmp_path / "b", "rule", "remedy")
    content.report(tmp_path / "a", "rule", "remedy")
    assert [(problem.path.name, problem.line, problem.rule) for problem in content.problems] == [
        ("a", 1, "rule"), ("a", 2, "rule"), ("a", 3, "rule"),
        ("b", None, "rule"), ("a", None, "5 more problems of this file are not listed"),
    ]  # fmt: skip

from __future__ import annotations

from pathlib import Path

import pytest

from data.voc_xml import UnreadableXml, read_annotation

PERSON = """<?xml version="1.0" encoding="{encoding}"?>
<annotation>
  <filename>Zürich.jpg</filename>
  <size><width>60</width><height>40</height></size>
  <object>
    <name> person
    </name>
    <bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>
    <unknown>thing</unknown>
  </object>

  <object><name>dog</name><difficult>1</difficult></object>
</annotation>
"""
LAUGHS = """<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><filename>&b;</filename></annotation>"""
OUTSIDE = """<!DOCTYPE annotation [<!ENTITY x SYSTEM "file://{secret}">]>
<annotation><filename>&x;</filename></annotation>"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_fields_and_lines(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(PERSON.format(encoding=encoding).encode(encoding))
    found = read_annotation(path)
    assert found.fields == {"filename": "Zürich.jpg", "size/width": "60", "size/height": "40"}
    person, dog = found.objects
    box = {"bndbox/xmin": "1", "bndbox/ymin": "2.5", "bndbox/xmax": "3", "bndbox/ymax": "4"}
    assert (person.line, person.fields) == (5, {"name": "person"} | box), "a part's name and box are not the object's"
    assert (dog.line, dog.fields) == (13, {"name": "dog", "difficult": "1"})


@pytest.mark.parametrize(
    "text", [LAUGHS, OUTSIDE, '<!DOCTYPE annotation SYSTEM "http://localhost/a.dtd"><annotation/>']
)
def test_attacks_are_refused(tmp_path: Path, text: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("geheim")
    path = tmp_path / "a.xml"
    path.write_text(text.format(secret=secret) if text == OUTSIDE else text)
    with pytest.raises(UnreadableXml, match="document types and entities are not allowed") as caught:
        read_annotation(path)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "rule", "line"),
    [
        (b"", "not XML: no element found", 1),
        (b"<annotation>\n<object>\n</annotation>", "not XML: mismatched tag", 3),
        (b"<annotation>\n&unknown;</annotation>", "not XML: undefined entity", 2),
        (b"\x89PNG\r\n\x1a\n", "not XML", 1),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "not XML: unknown encoding", None),
        (b"<html/>", "root must be <annotation>, found <html>", 1),
        (b"<annotation><object>\n<name>a</name>\n<name>b</name></object></annotation>", "<name> occurs twice", 3),
        (b"<annotation><size><width>1</width>\n<width>2</width></size></annotation>", "<size/width> occurs twice", 2),
    ],
)
def test_files_that_are_no_annotations(tmp_path: Path, content: bytes, rule: str, line: int | None) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(content)
    with pytest.raises(UnreadableXml, match=rule) as caught:
        read_annotation(path)
    assert caught.value.line == line


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UnreadableXml, match="the file is missing"):
        read_annotation(tmp_path / "a.xml")
    with pytest.raises(UnreadableXml, match="not a regular file"):
        read_annotation(tmp_path)


def test_deep_nesting_costs_no_more_than_its_length(tmp_path: Path) -> None:
    depth = 200_000
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{'<a>' * depth}{'</a>' * depth}<filename>f</filename></annotation>")
    assert read_annotation(path).fields == {"filename": "f"}

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from data.card import load_card
from data.importing import ImportRefused, recognise, register
from data.known_cards import KNOWN, differences, find_known, known_names
from data.records import SPLITS, Box, ImageRecord, Split

Make = Callable[..., Path]


def test_two_layouts_that_match_ask_for_a_format(coco_folder: Make, make_repo: Make) -> None:
    source = coco_folder()
    (source / "data.yaml").write_text("names: [car, boat]\n")
    for split in SPLITS:
        (source / "labels" / split).mkdir(parents=True)
        (source / "labels" / split / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ImportRefused) as caught:
        register("harbour", source, repo=make_repo())
    assert str(caught.value).splitlines() == [
        f"{str(source)!r}: has the layout of several formats. Say which with --format:",
        "  coco: found annotations/train.json, annotations/val.json, annotations/test.json",
        "  yolo: data.yaml names 2 classes and 3 pictures have a label file",
    ]


def test_no_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused) as caught:
        recognise(tmp_path)
    lines = str(caught.value).splitlines()
    assert "has the layout of no format that is known" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["coco", "voc", "yolo", "visdrone", "uavdt"]
    assert all(len(line) > 30 for line in lines[1:])


def test_coco_without_a_test_split(coco_folder: Make, make_repo: Make) -> None:
    source, repo = coco_folder(), make_repo()
    (source / "annotations/test.json").unlink()
    shutil.rmtree(source / "images/test")
    card, notes = register("harbour", source, repo=repo)
    assert card.splits.rule == "ratio"
    assert load_card("harbour", repo / "data/catalog") == card
    assert notes[0] == "coco: found annotations/train.json, annotations/val.json"
    assert any("put no picture into split 'test'" in note for note in notes), "two pictures are too few, and it is said"


@pytest.mark.parametrize("name", known_names())
def test_known_cards_are_sound(name: str) -> None:
    known = find_known(name)
    assert known is not None
    assert known.sources
    assert not (KNOWN.parent / "catalog" / f"{name}.yaml").exists(), "known is not registered"
    assert known_names() == ["neu-det", "tinyindus", "uavdt", "visdrone"]
    assert find_known("../known/neu-det") is None


def test_differences_give_both_numbers() -> None:
    known = find_known("neu-det")
    assert known is not None
    image = ImageRecord(1, "a.jpg", 200, 200, (Box(0, (1, 1, 2, 2), 4),), ())
    splits = {
        "train": Split([image] * 1440, num_boxes_excluded=3),
        "val": Split([image] * 179),
        "test": Split([image] * 180),
    }
    assert differences(known, splits) == [
        "total: expected 1800 images, found 1799",
        "total: expected 4189 boxes, found 1802",
    ]


def known_folder(coco_folder: Make, names: tuple[str, str]) -> Path:
    def rename(split: str, document: dict[str, list[dict[str, object]]]) -> None:
        for row, name in zip(document["categories"], names, strict=True):
            row["name"] = name

    return coco_folder(rename)


def test_a_known_card_is_used_by_name(coco_folder: Make, make_repo: Make) -> None:
    source, repo = known_folder(coco_folder, ("truck", "car")), make_repo()
    card, notes = register("visdrone", source, repo=repo)
    assert (card.format, card.protocol, card.ignore_rule) == ("coco", "visdrone", "covered-half")
    assert card.classes[3:6] == ("car", "van", "truck")
    assert "visdrone is known: its card comes from data/known/visdrone.yaml" in notes
    assert "warning: not as published: train: expected 6471 images, found 2" in notes
    assert "warning: not as published: val: expected 38759 boxes, found 4" in notes
    content = yaml.safe_load((repo / "data/catalog/visdrone.yaml").read_text())
    assert content["sources"][0].startswith("Zhu")
    assert "expected" not in content


def test_a_licence_that_is_given_holds(coco_folder: Make, make_repo: Make) -> None:
    card, _ = register("tinyindus", known_folder(coco_folder, ("q-pock", "st-flaw")), repo=make_repo(), licence="mine")
    assert card.licence == "mine"


def test_other_classes_than_known_are_refused(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo()
    with pytest.raises(ImportRefused, match=r"classes boat are none of those known .* Import it under another name"):
        register("visdrone", coco_folder(), repo=repo)
    assert list((repo / "data/catalog").iterdir()) == []


def test_errors_in_labels_are_refused_at_once(coco_folder: Make, make_repo: Make) -> None:
    def spoil(split: str, document: dict[str, list[dict[str, object]]]) -> None:
        document["annotations"][0]["category_id"] = 99

    with pytest.raises(ImportRefused, match=r"(?s)not sound coco data.*train\.json: .*val\.json: .*test\.json"):
        register("harbour", coco_folder(spoil), repo=make_repo())


def test_the_command(coco_folder: Make, make_repo: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import settings
    from flows.data_commands import data_app

    source = coco_folder()
    monkeypatch.setattr(settings, "REPO", make_repo())
    result = CliRunner().invoke(data_app, ["import", "harbour", str(source)])
    assert result.output.splitlines() == [
        "coco: found annotations/train.json, annotations/val.json, annotations/test.json",
        "train 2 images with 4 boxes, val 2 images with 4 boxes, test 2 images with 4 boxes",
        "ignore regions: a detection that lies half in them is not scored (ignore_rule in the card)",
        "licence: unknown; write it into the card, for it goes with every model",
        "harbour: 2 classes (car, boat); check it: speck data check harbour",
    ]
    result = CliRunner().invoke(data_app, ["import", "again", str(source), "--format", "yollo"])
    assert result.exit_code == 2
    assert "Did you mean 'yolo'?" in result.output

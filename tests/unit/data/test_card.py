from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data.card import InvalidCard, UnknownDataset, card_names, load_card

VALUES = {"name": "harbour", "description": "d", "licence": "l", "format": "coco", "source": "s", "classes": ["boat"]}


def _catalog(folder: Path, text: str) -> Path:
    (folder / "harbour.yaml").write_text(text)
    return folder


def test_every_card_of_the_repository_is_sound() -> None:
    assert "sample-aerial" in card_names()
    for name in card_names():
        assert load_card(name).name == name


def test_reads_what_was_written(tmp_path: Path) -> None:
    card = load_card("harbour", _catalog(tmp_path, yaml.safe_dump(VALUES)))
    assert card.classes == ("boat",)
    assert card_names(tmp_path) == ["harbour"]


@pytest.mark.parametrize("name", ["harbor", "../harbour", ""])
def test_unknown_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownDataset, match="Known: harbour") as caught:
        load_card(name, _catalog(tmp_path, yaml.safe_dump(VALUES)))
    assert ("Did you mean 'harbour'?" in str(caught.value)) == (name != "")


def test_all_faults_at_once_with_file_and_key(tmp_path: Path) -> None:
    values = VALUES | {"licens": "x", "format": "csv", "classes": ["boat", "boat"]}
    del values["source"]
    with pytest.raises(InvalidCard) as caught:
        load_card("harbour", _catalog(tmp_path, yaml.safe_dump(values)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{tmp_path / 'harbour.yaml'}: ") for line in lines)
    for part in (
        "licens: unknown key. Did you mean 'licence'?",
        "format: ",
        "classes: ",
        "source: this key is required",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not YAML"),
        ("- harbour", "card: "),
        (yaml.safe_dump(VALUES | {"name": "port"}), "must equal the file's name"),
        (
            yaml.safe_dump(VALUES | {"source": "s3://k:s@b"}),
            "source: .*must not hold a user or password",
        ),
        (yaml.safe_dump(VALUES | {"sources": ["s3://a", "s3://k:s@b"]}), "sources: .*must not hold a user or password"),
    ],
)
def test_not_a_card(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidCard, match=message):
        load_card("harbour", _catalog(tmp_path, text))

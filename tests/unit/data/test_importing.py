from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.card import InvalidCard, load_card
from data.checking import check
from data.importing import DatasetExists, ImportRefused, register
from data.prepare import prepare

Make = Callable[..., Path]


def _tree(repo: Path) -> dict[str, str]:
    paths = (path for path in repo.rglob("*") if not path.name.endswith(".lock"))
    return {str(path.relative_to(repo)): path.read_text() if path.is_file() else "" for path in paths}


def test_registered_data_can_be_prepared(coco_folder: Make, make_repo: Make) -> None:
    repo, source = make_repo(), coco_folder()
    card = register("harbour", source, "coco", repo=repo, licence="CC-BY-4.0", ignore_rule="covered-half")
    assert load_card("harbour", repo / "data/catalog") == card
    assert (card.classes, card.licence, card.ignore_rule) == (("car", "boat"), "CC-BY-4.0", "covered-half")
    assert card.source == "data/raw/harbour"
    assert str(source) not in (repo / "data/catalog/harbour.yaml").read_text(), "a path of one machine"
    assert (repo / "data/raw/harbour").readlink() == source
    assert (repo / "params.yaml").read_text() == (
        "# which datasets\ndatasets:\n  - alpha # first\n  - harbour\n  - zulu\nother: 1\n"
    )
    assert prepare("harbour", repo).is_dir()
    assert check("harbour", repo) == []


@pytest.mark.parametrize("taken", ["data/catalog/harbour.yaml", "data/raw/harbour"])
def test_existing_names_are_refused(coco_folder: Make, make_repo: Make, taken: str) -> None:
    repo = make_repo()
    (repo / taken).write_text("mine")
    before = _tree(repo)
    with pytest.raises(DatasetExists, match=taken):
        register("harbour", coco_folder(), "coco", repo=repo, licence="l")
    assert {key: text for key, text in _tree(repo).items() if not key.startswith(".dvc")} == before


def test_a_name_in_params_is_refused(coco_folder: Make, make_repo: Make) -> None:
    with pytest.raises(DatasetExists, match="lists it already"):
        register("zulu", coco_folder(), "coco", repo=make_repo(), licence="l")


def test_failure_leaves_nothing_behind(coco_folder: Make, make_repo: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the three writes fails, as on a full disk."""
    repo, source = make_repo(), coco_folder()
    before = _tree(repo)
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.name == "params.yaml":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        register("harbour", source, "coco", repo=repo, licence="l")
    assert {key: text for key, text in _tree(repo).items() if not key.startswith(".dvc")} == before


def test_bad_names_and_licences(coco_folder: Make, make_repo: Make) -> None:
    with pytest.raises(InvalidCard, match=r"name: .*'\.\./x'"):
        register("../x", coco_folder(), "coco", repo=make_repo(), licence="l")


def test_incomplete_folders_are_refused(coco_folder: Make, make_repo: Make) -> None:
    source, repo = coco_folder(), make_repo()
    (source / "annotations/val.json").unlink()
    with pytest.raises(ImportRefused, match=r"a COCO folder holds .* Add what is missing: .*val\.json"):
        register("harbour", source, "coco", repo=repo, licence="l")


def test_a_missing_folder_is_refused(make_repo: Make, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"absent': raw data must be a folder.* Correct the path"):
        register("harbour", tmp_path / "absent", "coco", repo=make_repo(), licence="l")


@pytest.mark.parametrize(
    ("text", "rule"),
    [("", "not JSON"), ("[]", "top level"), ('{"images": [], "annotations": []}', "'categories' must")],
)
def test_unsound_annotation_files_are_refused(coco_folder: Make, make_repo: Make, text: str, rule: str) -> None:
    source = coco_folder()
    (source / "annotations/val.json").write_text(text)
    with pytest.raises(ImportRefused, match=rf"val\.json: error: .*{rule}"):
        register("harbour", source, "coco", repo=make_repo(), licence="l")


def test_splits_with_other_classes_are_refused(coco_folder: Make, make_repo: Make) -> None:
    def spoil(split: str, document: dict[str, Any]) -> None:
        if split == "test":
            document["categories"][0]["name"] = "ship"

    with pytest.raises(ImportRefused, match=r"same categories, found .*ship.* Correct"):
        register("harbour", coco_folder(spoil), "coco", repo=make_repo(), licence="l")

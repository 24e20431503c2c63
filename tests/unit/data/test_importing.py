from __future__ import annotations

import shutil
import signal
import subprocess
import sys
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


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_registered_data_can_be_prepared(coco_folder: Make, make_repo: Make) -> None:
    repo, source = make_repo(), coco_folder()
    card = register("harbour", source, "coco", repo=repo, licence="CC-BY-4.0", ignore_rule="covered-half").card
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


def test_a_copy_is_our_own(coco_folder: Make, make_repo: Make) -> None:
    """Even of a read-only folder, of which one part is a link; it does not follow later changes of the source."""
    repo, source = make_repo(), coco_folder()
    (source / "images/val").rename(source.with_name("val"))
    (source / "images/val").symlink_to(source.with_name("val"))
    (source / "LICENCE").write_text("CC0")
    (source / "LICENCE").chmod(0o444)
    source.chmod(0o555)
    register("harbour", source, "coco", repo=repo, licence="l", copy=True)
    source.chmod(0o755)
    raw = repo / "data/raw/harbour"
    assert not any(path.is_symlink() for path in (raw, *raw.rglob("*")))
    assert all(path.stat().st_mode & 0o200 for path in (raw, *raw.rglob("*")))
    assert _bytes(raw) == _bytes(source) | {
        f"images/val/{name}": data for name, data in _bytes(source / "images/val").items()
    }
    shutil.rmtree(source)
    assert prepare("harbour", repo).is_dir()
    assert check("harbour", repo) == []


@pytest.mark.parametrize("failing", ["b.png", "harbour.yaml", "params.yaml"])
def test_a_failed_copy_leaves_nothing_behind(
    coco_folder: Make, make_repo: Make, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The disk is full in the middle of the copy, or at one of the writes after it."""
    repo, source = make_repo(), coco_folder()
    before = _tree(repo)
    copyfile, replace = shutil.copyfile, Path.replace

    def full_copy(path: Path, target: Path) -> Path:
        if path.name == failing:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return copyfile(path, target)

    def full_replace(path: Path, target: Path) -> Path:
        if target.name == failing:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(shutil, "copyfile", full_copy)
    monkeypatch.setattr(Path, "replace", full_replace)
    with pytest.raises(OSError, match="No space left"):
        register("harbour", source, "coco", repo=repo, licence="l", copy=True)
    assert {key: text for key, text in _tree(repo).items() if not key.startswith(".dvc")} == before


def test_what_a_killed_copy_left_is_replaced(coco_folder: Make, make_repo: Make) -> None:
    repo, source = make_repo(), coco_folder()
    leftover = repo / "data/raw/.harbour.partial/images"
    leftover.mkdir(parents=True)
    (leftover / "half.png").write_bytes(b"half")
    register("harbour", source, "coco", repo=repo, licence="l", copy=True)
    assert _bytes(repo / "data/raw") == {f"harbour/{name}": data for name, data in _bytes(source).items()}


@pytest.mark.parametrize("copy", [False, True])
def test_a_folder_that_holds_the_repository_is_refused(coco_folder: Make, make_repo: Make, copy: bool) -> None:
    repo, source = make_repo(), coco_folder()
    for part in ("images", "annotations"):
        (source / part).rename(repo.parent / part)
    with pytest.raises(ImportRefused, match="holds data/raw, which would hold itself"):
        register("harbour", repo.parent, "coco", repo=repo, licence="l", copy=copy)


def test_names_that_git_would_take_in_are_refused(coco_folder: Make, make_repo: Make) -> None:
    rules = (Path(__file__).parents[3] / "data/raw/.gitignore").read_text()
    assert "!/sample-*" in rules
    with pytest.raises(ImportRefused, match=r"'sample-harbour': names in sample-\* are .* Choose another name"):
        register("sample-harbour", coco_folder(), "coco", repo=make_repo(), licence="l")


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
    shutil.rmtree(source / "images")
    with pytest.raises(ImportRefused, match=r"train\.json: error: the folder of its pictures is missing\. Provide it"):
        register("harbour", source, "coco", repo=repo, licence="l")
    shutil.rmtree(source / "annotations")
    with pytest.raises(ImportRefused, match=r"a COCO folder holds .* Add what is missing"):
        register("harbour", source, "coco", repo=repo, licence="l")


def test_a_missing_folder_is_refused(make_repo: Make, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"absent': raw data is a folder, an archive .* Correct the path"):
        register("harbour", tmp_path / "absent", "coco", repo=make_repo(), licence="l")


@pytest.mark.parametrize(
    ("text", "rule"),
    [("", "not JSON"), ("[]", "top level"), ('{"images": [], "annotations": []}', "'categories' must")],
)
def test_unsound_annotation_files_are_refused(coco_folder: Make, make_repo: Make, text: str, rule: str) -> None:
    source = coco_folder()
    (source / "annotations/val.json").write_text(text)
    with pytest.raises(ImportRefused, match=rf"val\.json(:1:1)?: error: .*{rule}"):
        register("harbour", source, "coco", repo=make_repo(), licence="l")


def test_splits_with_other_classes_are_refused(coco_folder: Make, make_repo: Make) -> None:
    def spoil(split: str, document: dict[str, Any]) -> None:
        if split == "test":
            document["categories"][0]["name"] = "ship"

    with pytest.raises(ImportRefused, match=r"same categories, found .*ship.* Correct"):
        register("harbour", coco_folder(spoil), "coco", repo=make_repo(), licence="l")


KILLED = """
import os, signal, sys
from pathlib import Path
import data.importing
write = data.importing.write_whole
def write_or_die(path, text):
    if path.name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
data.importing.write_whole = write_or_die
data.importing.register("harbour", sys.argv[2], repo=Path(sys.argv[3]), copy=True)
"""


@pytest.mark.parametrize("before", ["harbour.yaml", "params.yaml"])
def test_a_killed_import_can_be_done_again(coco_folder: Make, make_repo: Make, before: str) -> None:
    source, repo = coco_folder(), make_repo()
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", KILLED, before, str(source), str(repo)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (repo / "data/raw/harbour").is_dir()
    register("harbour", source, repo=repo)
    assert (repo / "data/raw/harbour").is_symlink()
    assert sorted(path.name for path in (repo / "data/raw").iterdir()) == ["harbour"]


def test_what_somebody_put_there_is_nobody_elses_leftover(coco_folder: Make, make_repo: Make) -> None:
    source, repo = coco_folder(), make_repo()
    (repo / "data/raw/harbour").mkdir()
    with pytest.raises(DatasetExists):
        register("harbour", source, repo=repo)
    assert (repo / "data/raw/harbour").is_dir()


@pytest.mark.parametrize("name", ["images/more", "annotations/train.json"])
def test_links_out_of_the_folder_are_refused_and_copied(
    coco_folder: Make, make_repo: Make, tmp_path: Path, name: str
) -> None:
    """A folder and an annotation file; pictures that are links are told one by one by the check."""
    source, repo = coco_folder(), make_repo()
    outside = tmp_path / "outside"
    if name == "images/more":
        outside.mkdir()
    else:
        (source / name).rename(outside)
    (source / name).symlink_to(outside)
    with pytest.raises(ImportRefused, match=rf"{name}: error: a link that leads out of the dataset's folder"):
        register("harbour", source, repo=repo)
    register("harbour", source, repo=repo, copy=True)
    assert not any(path.is_symlink() for path in (repo / "data/raw/harbour").rglob("*"))
    assert check("harbour", repo) == []


def test_missing_pictures_are_told(coco_folder: Make, make_repo: Make) -> None:
    source, repo = coco_folder(), make_repo()
    (source / "images/train/a.png").unlink()
    notes = register("harbour", source, repo=repo).notes
    assert f"warning: 1 of 6 pictures are missing, for example {source}/images/train/a.png" in notes
    for path in source.glob("images/*/*"):
        path.unlink()
    with pytest.raises(ImportRefused, match=r"none of 6 pictures is there, for example .* Add them"):
        register("again", source, repo=repo)


def test_ignore_regions_are_heeded_unless_somebody_says_otherwise(coco_folder: Make, make_repo: Make) -> None:
    repo = make_repo()
    assert register("harbour", coco_folder(), repo=repo).card.ignore_rule == "covered-half"
    assert register("other", coco_folder(name="b"), repo=repo, ignore_rule="none").card.ignore_rule == "none"
    without = coco_folder(lambda _, document: document["images"][1].pop("ignore_regions_xywh"), name="c")
    assert register("third", without, repo=repo).card.ignore_rule == "none"

"""DVC for real, in a copy of the repository with a small sample dataset."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from data.importing import register
from data.loader import DetectionDataset
from data.store import materialise
from data.versioning import DvcLocked, VersioningFailed, current_version, planned_version, version_dataset

ROOT = Path(__file__).parents[2]
CALL = """
import sys
from pathlib import Path
from data.versioning import version_dataset
print(version_dataset(sys.argv[1], Path(sys.argv[2])).version)
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The parts of the repository that the stage `prepare` needs, with a sample of seven pictures."""
    repo = tmp_path / "repo"
    names = ["dvc.yaml", "params.yaml", ".dvcignore", ".dvc/config", "data/catalog/sample-aerial.yaml"]
    names += ["data/raw/sample-aerial/recipe.yaml"]
    names += [str(path.relative_to(ROOT)) for path in (*ROOT.glob("data/*.py"), *ROOT.glob("data/samples/*.py"))]
    for name in names:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, repo / name)
    (repo / "params.yaml").write_text("datasets:\n  - sample-aerial\n")
    _edit_recipe(repo, {"num_images": {"train": 3, "val": 2, "test": 2}})
    subprocess.run(["git", "init", "--quiet", str(repo)], check=True)
    return repo


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A user's own COCO folder outside the repository."""
    folder = tmp_path / "elsewhere" / "harbour"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        cv2.imwrite(str(folder / f"images/{split}.png"), np.full((20, 30, 3), number, np.uint8))
        document = {
            "images": [{"id": 1, "file_name": f"{split}.png", "width": 30, "height": 20}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 4, 5]}],
            "categories": [{"id": 1, "name": "boat"}],
        }
        (folder / f"annotations/{split}.json").write_text(json.dumps(document))
    return folder


def _edit_recipe(repo: Path, values: dict[str, Any]) -> None:
    path = repo / "data/raw/sample-aerial/recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_the_version_follows_the_data_and_only_the_data(repo: Path, tmp_path: Path) -> None:
    assert current_version("sample-aerial", repo) is None
    first = version_dataset("sample-aerial", repo)
    assert (first.regenerated, first.num_files) == (True, 10)
    again = version_dataset("sample-aerial", repo)
    assert (again.version, again.regenerated) == (first.version, False)
    assert current_version("sample-aerial", repo) == again

    with (repo / "data/prepare.py").open("a") as code:
        code.write("# another remark\n")
    remarked = version_dataset("sample-aerial", repo)
    assert (remarked.version, remarked.regenerated) == (first.version, True)

    _edit_recipe(repo, {"seed": 1})
    assert planned_version("sample-aerial", repo) is None, "only preparing it can tell"
    other = version_dataset("sample-aerial", repo)
    assert other.version != first.version
    assert planned_version("sample-aerial", repo) == replace(other, regenerated=False)
    shutil.rmtree(repo / "data/processed/sample-aerial")
    assert planned_version("sample-aerial", repo) == replace(other, regenerated=False), "as in a fresh clone"
    assert version_dataset("sample-aerial", repo).version == other.version
    cache = str(repo / ".dvc/cache")
    for version in (first, other):
        folder = materialise("sample-aerial", version.version, source=cache, root=tmp_path / "node")
        assert len(DetectionDataset(folder, "train", input_size_px=64, augment=None, seed=0)) == 3
    prepared = repo / "data/processed/sample-aerial/images/train-000000.jpg"
    assert prepared.stat().st_mode & 0o222 == 0
    assert not list((repo / "data/processed").glob(".*.partial"))


def test_a_linked_folder_outside_is_followed(repo: Path, source: Path) -> None:
    register("harbour", source, "coco", repo=repo, licence="CC0-1.0")
    first = version_dataset("harbour", repo)
    assert current_version("sample-aerial", repo) is None
    assert (source / "images/train.png").stat().st_mode & 0o200
    cv2.imwrite(str(source / "images/train.png"), np.full((20, 30, 3), 77, np.uint8))
    second = version_dataset("harbour", repo)
    assert second.regenerated
    assert second.version != first.version


def test_pascal_voc_copied_in_is_versioned_and_kept_out_of_git(repo: Path, tmp_path: Path) -> None:
    source = tmp_path / "plates"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (source / part).mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        cv2.imwrite(str(source / f"JPEGImages/{split}.png"), np.full((20, 30, 3), number, np.uint8))
        (source / f"ImageSets/Main/{split}.txt").write_text(split)
        (source / f"Annotations/{split}.xml").write_text(
            "<annotation><size><width>30</width><height>20</height></size><object><name>dent</name><bndbox>"
            "<xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>18</ymax></bndbox></object></annotation>"
        )
    shutil.copyfile(ROOT / "data/raw/.gitignore", repo / "data/raw/.gitignore")
    register("plates", source, "voc", repo=repo, licence="CC0-1.0", copy=True)
    shutil.rmtree(source)
    first = version_dataset("plates", repo)
    assert (first.regenerated, first.num_files) == (True, 6)
    assert version_dataset("plates", repo).version == first.version
    document = json.loads((repo / "data/processed/plates/annotations/val.json").read_bytes())
    assert [row["bbox"] for row in document["annotations"]] == [[2, 3, 10, 15]]
    shown = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all", "data/raw", "data/catalog"],
        cwd=repo, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "data/catalog/plates.yaml" in shown
    assert "data/raw/sample-aerial/recipe.yaml" in shown
    assert "data/raw/plates" not in shown


def test_a_failed_preparation_shows_its_own_message(repo: Path, source: Path) -> None:
    register("harbour", source, "coco", repo=repo, licence="CC0-1.0")
    (source / "images/val.png").unlink()
    # In the first line, which is all that a leaderboard shows.
    with pytest.raises(
        VersioningFailed, match=r"\A.*`dvc repro prepare@harbour` failed: .*val\.png: error: the image is"
    ):
        version_dataset("harbour", repo)
    assert current_version("harbour", repo) is None
    assert not (repo / "data/processed/harbour").exists()


def test_a_dataset_without_stage(repo: Path, source: Path) -> None:
    register("harbour", source, "coco", repo=repo, licence="CC0-1.0")
    (repo / "params.yaml").write_text("datasets:\n  - sample-aerial\n")
    with pytest.raises(VersioningFailed, match=r"add it to `datasets` in params\.yaml"):
        version_dataset("harbour", repo)


@pytest.mark.parametrize("is_alive", [True, False])
def test_foreign_and_stale_dvc_locks(repo: Path, source: Path, is_alive: bool) -> None:
    """A living process blocks with a remedy; what a killed one left behind does not."""
    register("harbour", source, "coco", repo=repo, licence="CC0-1.0")
    if is_alive:
        pid = os.getpid()
    else:
        ended = subprocess.Popen(["true"])
        ended.wait()
        pid = ended.pid
    lock = {"read": {}, "write": {str(repo / "data/processed/harbour"): {"pid": pid, "cmd": "dvc repro"}}}
    (repo / ".dvc/tmp/rwlock").write_text(json.dumps(lock))
    if is_alive:
        with pytest.raises(DvcLocked, match=r"remove \.dvc/tmp/lock and \.dvc/tmp/rwlock"):
            version_dataset("harbour", repo)
    else:
        assert version_dataset("harbour", repo).regenerated


def test_two_callers_take_turns(repo: Path) -> None:
    command = [sys.executable, "-c", CALL, "sample-aerial", str(repo)]
    callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    versions = {caller.communicate(timeout=300)[0].strip() for caller in callers}
    assert [caller.returncode for caller in callers] == [0, 0]
    assert len(versions) == 1
    assert len(versions.pop()) == 32


def test_a_dvc_that_outlives_its_killed_caller_is_waited_for(repo: Path, source: Path) -> None:
    """Otherwise the next caller would run into DVC's own lock."""
    register("harbour", source, "coco", repo=repo, licence="CC0-1.0")
    dvc_yaml = repo / "dvc.yaml"
    dvc_yaml.write_text(dvc_yaml.read_text().replace("cmd: python", "cmd: touch started && sleep 6 && python"))
    caller = subprocess.Popen([sys.executable, "-c", CALL, "harbour", str(repo)])
    deadline = time.monotonic() + 300
    while not (repo / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert current_version("harbour", repo) is None
    version = version_dataset("harbour", repo)
    assert not version.regenerated

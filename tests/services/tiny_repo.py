"""A small repository whose dataset `tiny` DVC prepares from a list of names, and what is done with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from data.remote import cache_folder
from data.versioning import version_dataset

ROOT = Path(__file__).parents[2]
# Stands for the real preparation: one annotation file per split, one picture per line of the raw list.
PREPARE = """
import json, pathlib
out = pathlib.Path("data/processed/tiny")
(out / "images").mkdir(parents=True, exist_ok=True)
(out / "annotations").mkdir(exist_ok=True)
info = {"num_boxes_clipped": 0, "num_boxes_excluded": 0}
lines = pathlib.Path("data/raw/tiny/list.txt").read_text().split()
for split, names in zip(("train", "val", "test"), (lines[:-2], lines[-2:-1], lines[-1:])):
    images = [{"id": n, "file_name": f"{name}.png", "width": 8, "height": 8, "ignore_regions_xywh": []}
              for n, name in enumerate(names, 1)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, len(name), 2], "iscrowd": 0}
             for n, name in enumerate(names, 1)]
    document = {"info": info, "images": images, "annotations": boxes, "categories": [{"id": 1, "name": "car"}]}
    (out / f"annotations/{split}.json").write_text(json.dumps(document))
    for name in names:
        (out / f"images/{name}.png").write_bytes(name.encode() * 5000)
"""


def dvc(repo: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=repo, check=True, capture_output=True)


def tiny_repo(folder: Path) -> Path:
    """A repository with one prepared version of a dataset whose raw data is a list of names."""
    repo = folder / "repo"
    (repo / "data/catalog").mkdir(parents=True)
    (repo / "data/raw/tiny").mkdir(parents=True)
    (repo / ".dvc").mkdir()
    shutil.copyfile(ROOT / ".dvc/config", repo / ".dvc/config")
    (repo / "prepare.py").write_text(PREPARE)
    card = {"name": "tiny", "description": "d", "licence": "l", "format": "coco", "source": "s", "classes": ["car"]}
    (repo / "data/catalog/tiny.yaml").write_text(yaml.safe_dump(card))
    stage = {
        "matrix": {"dataset": ["tiny"]},
        "cmd": "python prepare.py",
        "deps": ["data/raw/${item.dataset}"],
        "outs": ["data/processed/${item.dataset}"],
    }
    (repo / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prepare": stage}}))
    subprocess.run(["git", "init", "--quiet", str(repo)], check=True)
    return repo


def prepare(repo: Path, *names: str) -> str:
    """Make a version of pictures with these names, the last two for val and test."""
    (repo / "data/raw/tiny/list.txt").write_text("\n".join(names))
    return version_dataset("tiny", repo).version


def fresh_clone(repo: Path) -> None:
    """Take away what git does not keep: the cache and the prepared files."""
    for path in (repo / ".dvc/cache", repo / "data/processed"):
        shutil.rmtree(path)


def tree(repo: Path) -> dict[str, bytes]:
    folder = repo / "data/processed/tiny"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_one_with_the_cache(repo: Path) -> bool:
    """Whether each prepared file is another name of an object in DVC's cache."""
    objects = {path.stat().st_ino for path in cache_folder(repo).glob("files/md5/*/*")}
    paths = [path for path in (repo / "data/processed/tiny").rglob("*") if path.is_file()]
    return {path.stat().st_ino for path in paths} <= objects and bool(paths)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)

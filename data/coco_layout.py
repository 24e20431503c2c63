"""Where a COCO folder keeps its files: our own layout, the one of COCO's downloads, and that of export tools.

By split, these are known:

- `annotations/train.json` or `instances_train2017.json`, with pictures in `train2017/`, `train/` or right in `images/`,
  the first two below `images/` if there is such a folder,
- `train/_annotations.coco.json` beside its pictures.

`valid` and `validation` mean val. Other annotation files, such as those of captions, are not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from data.label_files import is_safe_name
from data.records import SPLITS

IMAGES = "images"
ANNOTATIONS = "annotations"
# What tools put beside the pictures of a split.
EXPORTED = "_annotations.coco.json"
_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
# `train.json`, `instances_train2017.json`, `instances_test-dev2017.json`
_FILE = re.compile(rf"(?:instances_)?((?:{'|'.join(_SPLIT_OF)})(?:-dev)?\d*)\.json")


class CocoFile(NamedTuple):
    """An annotation file; its pictures' names are relative to one of `folders`, which are below the layout's images."""

    path: Path
    folders: tuple[str, ...]


class CocoLayout(NamedTuple):
    """`images`: the folder that pictures' names are relative to; `files`: split -> its files, which should be one."""

    images: Path
    files: dict[str, list[CocoFile]]


def annotation_file(folder: Path, split: str) -> Path:
    """Path of a split's annotation file in our own layout, that of prepared datasets."""
    return folder / ANNOTATIONS / f"{split}.json"


def find_layout(folder: Path) -> CocoLayout:
    """Look for annotation files and the folders of their pictures; `files` is empty where there are none."""
    images = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    files: dict[str, list[CocoFile]] = {}
    for path in sorted((folder / ANNOTATIONS).glob("*.json")):
        if (match := _FILE.fullmatch(path.name)) is not None:
            split = _SPLIT_OF[match[1].rstrip("0123456789").removesuffix("-dev")]
            names = dict.fromkeys((match[1], *_NAMES[split]))
            found = [name for name in names if (images / name).is_dir()] + ([""] if images != folder else [])
            if found:
                files.setdefault(split, []).append(CocoFile(path, tuple(found)))
    if images == folder:
        for name, split in _SPLIT_OF.items():
            path = folder / name / EXPORTED
            if path.is_file():
                files.setdefault(split, []).append(CocoFile(path, (name,)))
    return CocoLayout(images, {split: files[split] for split in SPLITS if split in files})


def folder_of(images: Path, file: CocoFile, names: Iterable[str], known: Container[str] = ()) -> str:
    """Return the one of a file's folders that has a picture of these names, there or `known`, else the last."""
    for name in filter(is_safe_name, names):
        for folder in file.folders:
            if below(folder, name) in known or os.path.isfile(images / folder / name):
                return folder
    return file.folders[-1]


def below(folder: str, name: str) -> str:
    """Return a picture's name with the folder it is in."""
    return f"{folder}/{name}" if folder else name

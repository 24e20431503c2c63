"""Where a COCO folder keeps its files: our own layout, the one of COCO's downloads, and those of export tools.

By split, these are known:

- `annotations/train.json` or `instances_train2017.json`, with pictures in `train2017/`, `train/` or right in `images/`,
  the first two below `images/` if there is such a folder,
- `train/_annotations.coco.json` beside its pictures.

`valid` and `validation` mean val. Other files of annotations, such as captions, are not looked at. Without splits:
`_annotations.coco.json`, or the only file in `annotations/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from data.dividing import UNASSIGNED
from data.label_files import is_safe_name
from data.records import SPLITS

IMAGES = "images"
ANNOTATIONS = "annotations"
# What tools put beside the pictures of a split.
EXPORTED = "_annotations.coco.json"
IN_FRONT = "../"
_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
# `train.json`, `instances_train2017.json`, `instances_test-dev2017.json`
_FILE = re.compile(rf"(?:instances_)?((?:{'|'.join(_SPLIT_OF)})(?:-dev)?\d*)\.json")


class CocoFile(NamedTuple):
    """An annotation file; its pictures' names are relative to one of `folders`, which are below the layout's images.

    Or they are relative to the dataset's folder and begin with `images/`: the folder is then IN_FRONT.
    """

    path: Path
    folders: tuple[str, ...]


class CocoLayout(NamedTuple):
    """`images`: the folder that pictures' names are relative to; `files`: split, or UNASSIGNED, -> its files.

    There should be one file for each.
    """

    images: Path
    files: dict[str, list[CocoFile]]


def annotation_file(folder: Path, split: str) -> Path:
    """Path of a split's annotation file in our own layout, that of prepared datasets."""
    return folder / ANNOTATIONS / f"{split}.json"


def prepared_layout(folder: Path) -> CocoLayout:
    """The layout of a prepared dataset, where nothing has to be looked for."""
    files = {split: annotation_file(folder, split) for split in SPLITS}
    found: dict[str, list[CocoFile]] = {
        split: [CocoFile(path, ("",))] for split, path in files.items() if os.path.lexists(path)
    }
    return CocoLayout(folder / IMAGES, found)


def find_layout(folder: Path) -> CocoLayout:
    """Look for annotation files and the folders of their pictures; a file whose folder is missing has none."""
    images = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    here = ["", IN_FRONT] if images != folder else []
    paths = sorted((folder / ANNOTATIONS).glob("*.json"))
    files: dict[str, list[CocoFile]] = {}
    for path in paths:
        if (match := _FILE.fullmatch(path.name)) is not None:
            split = _SPLIT_OF[match[1].rstrip("0123456789").removesuffix("-dev")]
            names = dict.fromkeys((match[1], *_NAMES[split]))
            found = [name for name in names if (images / name).is_dir()]
            files.setdefault(split, []).append(CocoFile(path, (*found, *here)))
    for name, split in _SPLIT_OF.items() if images == folder else ():
        path = folder / name / EXPORTED
        if path.is_file():
            files.setdefault(split, []).append(CocoFile(path, (name,)))
    if not files and (folder / EXPORTED).is_file():
        files[UNASSIGNED] = [CocoFile(folder / EXPORTED, tuple(here) or ("",))]
    elif not files and len(paths) == 1 and here:
        only = paths[0].stem.removeprefix("instances_")
        files[UNASSIGNED] = [CocoFile(paths[0], (*([only] if (images / only).is_dir() else []), *here))]
    return CocoLayout(images, {split: files[split] for split in (*SPLITS, UNASSIGNED) if split in files})


def folder_of(images: Path, file: CocoFile, names: Iterable[str], known: Container[str] = ()) -> str:
    """Return the one of a file's folders that has a picture of these names, there or `known`, or a likely one."""
    for name in filter(is_safe_name, names):
        for folder in file.folders:
            found = below(folder, name)
            if found in known or os.path.isfile(images / found):
                return folder
    return next((folder for folder in reversed(file.folders) if folder != IN_FRONT), "")


def below(folder: str, name: str) -> str:
    """Return a picture's name relative to the layout's images, of one that is relative to a file's folder."""
    return name.removeprefix(f"{IMAGES}/") if folder == IN_FRONT else f"{folder}/{name}" if folder else name


def above(folder: str, name: str) -> str:
    """The way back: a picture's name as its annotation file has it."""
    return f"{IMAGES}/{name}" if folder == IN_FRONT else name.removeprefix(below(folder, ""))

"""The pictures of a folder: which there are, and how large each is by its header."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.headers import SUFFIXES as SUFFIXES_BY_FORMAT
from data.headers import read_header
from data.images import INSTEAD_OF_A_LINK, leads_out, threads
from data.label_files import UnreadableFile
from data.problems import Problem

SUFFIXES = frozenset(suffix for suffixes in SUFFIXES_BY_FORMAT.values() for suffix in suffixes)
# The longest side a JPEG can have; it also keeps every area finite.
MAX_SIDE_PX = 65_535
# What macOS adds to archives: `__MACOSX/._a.jpg` is not a picture.
_FOREIGN = "__MACOSX"


class Size(NamedTuple):
    """Width and height of a picture as stored, in pixels."""

    width_px: int
    height_px: int


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it and sorted, but of hidden ones; links are followed, once."""
    names: list[str] = []
    seen: set[str] = set()
    for place, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        below = Path(place).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not is_hidden(name)]
    return sorted(names)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the data."""
    return name.startswith(".") or name == _FOREIGN


def is_picture(name: str) -> bool:
    """Whether a file name has the suffix of a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def link_problems(folder: Path) -> list[Problem]:
    """Return an error for each folder, and each file but pictures, that is a link out of `folder`."""
    root = Path(os.path.realpath(folder))
    rule = "a link that leads out of the dataset's folder is not followed"
    return [
        Problem(Path(place, name), None, rule, INSTEAD_OF_A_LINK)
        for place, folders, files in os.walk(root)
        for name in sorted([*folders, *(name for name in files if not is_picture(name))])
        if leads_out(Path(place, name), root)
    ]


def sizes(folder: Path, names: Sequence[str]) -> Iterator[Size | UnreadableFile]:
    """Yield the size of every named picture, or why its header cannot be read; several files are read at a time."""
    with threads() as pool:
        yield from pool.map(lambda name: _size(folder / name), names)


def _size(path: Path) -> Size | UnreadableFile:
    try:
        header = read_header(path)
    except UnreadableFile as error:
        return error
    except FileNotFoundError as error:
        return UnreadableFile(f"the image cannot be read: {error}")
    return Size(header.width_px, header.height_px)

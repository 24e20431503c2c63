"""`read_raw`: a folder of pictures with labels, in any format that has a reader, and everything wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.coco import IMAGES, read_coco
from data.images import image_problems, threads
from data.problems import Problem
from data.records import Split
from data.voc import read_voc, voc_folder


class Reader(NamedTuple):
    """`read`: (folder, classes) -> records by split; `images`: folder -> the folder that file names are relative to."""

    read: Callable[[Path, Sequence[str]], dict[str, Split]]
    images: Callable[[Path], Path]


READERS = {
    "coco": Reader(read_coco, lambda folder: folder / IMAGES),
    "voc": Reader(read_voc, lambda folder: voc_folder(folder).images),
}


class RawData(NamedTuple):
    """The records of a folder, the pictures' folder, and the problems of labels and pictures alike."""

    splits: dict[str, Split]
    images: Path
    problems: list[Problem]


def read_raw(format: str, folder: Path, classes: Sequence[str]) -> RawData:
    """Read labels and pictures in a format of READERS; every fault becomes a `Problem`, nothing is raised."""
    reader = READERS[format]
    splits, images = reader.read(folder, classes), reader.images(folder)
    problems = [problem for content in splits.values() for problem in content.problems]
    problems += image_problems(images, [record for content in splits.values() for record in content.images])
    return RawData(splits, images, problems + _repeated_pictures(images, splits))


def _repeated_pictures(images: Path, splits: Mapping[str, Split]) -> list[Problem]:
    """Return pictures of other names with the same bytes: a leak between splits, a warning within one."""
    owners = {record.file_name: split for split, content in splits.items() for record in content.images}
    first: dict[str, str] = {}
    problems = []
    with threads() as pool:
        digests = pool.map(lambda name: _digest(images / name), owners)
        for name, digest in zip(owners, digests, strict=True):
            other = first.setdefault(digest, name) if digest is not None else name
            if other == name:
                continue
            same, place = f"the same bytes as {other!r}", images / name
            if owners[name] == owners[other]:
                rule = f"{same}, also in split {owners[name]!r}: one picture counts twice"
                problems.append(Problem(place, None, rule, "Kept: remove one if that is not meant", "warning"))
            else:
                rule = f"leak: split {owners[name]!r} holds {same} in {owners[other]!r}, so a score would not be fair"
                problems.append(Problem(place, None, rule, "Keep both in one split, or one of them"))
    return problems


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or None where it cannot be read, which `image_problems` reports."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None

"""`read_raw`: a folder of pictures with labels, in any format that has a reader, and everything wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data import coco, uavdt, visdrone, voc, yolo
from data.coco_layout import IMAGES, find_layout, prepared_layout
from data.dividing import Divider, digests
from data.images import image_problems
from data.pictures import link_problems
from data.problems import Problem
from data.records import Split
from data.splits import SplitRule


class Reader(NamedTuple):
    """One format.

    `recognise`: folder -> whether its layout is this one, and why. `class_names`: folder -> names in its own order;
    ImportRefused when they cannot be told. `read`: (folder, classes, divider) -> records by split. `images`: folder ->
    the folder that file names are relative to. `is_foreign`: links that lead out of the folder are not followed.
    """

    recognise: Callable[[Path], tuple[bool, str]]
    class_names: Callable[[Path], tuple[str, ...]]
    read: Callable[[Path, Sequence[str], Divider], dict[str, Split]]
    images: Callable[[Path], Path]
    is_foreign: bool = True


READERS = {
    "coco": Reader(coco.recognise, coco.class_names, coco.read_coco, lambda folder: find_layout(folder).images),
    "voc": Reader(voc.recognise, voc.class_names, voc.read_voc, lambda folder: voc.voc_folder(folder).images),
    "yolo": Reader(yolo.recognise, yolo.class_names, yolo.read_yolo, lambda folder: folder),
    "visdrone": Reader(visdrone.recognise, visdrone.class_names, visdrone.read_visdrone, lambda folder: folder),
    "uavdt": Reader(uavdt.recognise, uavdt.class_names, uavdt.read_uavdt, lambda folder: folder),
}
# Files of our own making: nothing is looked for, and DVC may have made them links into its cache.
PREPARED = "prepared"
_PREPARED_READER = Reader(
    coco.recognise,
    partial(coco.class_names, find=prepared_layout),
    partial(coco.read_coco, find=prepared_layout),
    lambda folder: folder / IMAGES,
    is_foreign=False,
)


class RawData(NamedTuple):
    """The records of a folder, the pictures' folder, and the problems of labels and pictures alike."""

    splits: dict[str, Split]
    images: Path
    problems: list[Problem]


class Labels(NamedTuple):
    """The records of a folder by split and their problems; and how it was divided, with the problems of that."""

    splits: dict[str, Split]
    problems: list[Problem]
    divider: Divider


def read_raw(format: str, folder: Path, classes: Sequence[str], rule: SplitRule) -> RawData:
    """Read labels and pictures in a format of READERS, or PREPARED; every fault becomes a `Problem`, none is raised."""
    labels = read_labels(format, folder, classes, rule)
    images = labels.divider.images
    records = [record for content in labels.splits.values() for record in content.images]
    is_foreign = reader_of(format).is_foreign
    problems = (link_problems(folder) if is_foreign else []) + labels.divider.problems + labels.problems
    problems += image_problems(images, records, is_foreign=is_foreign)
    return RawData(labels.splits, images, problems + _repeated_pictures(labels))


def reader_of(format: str) -> Reader:
    """Return the reader of a format of READERS, or of PREPARED."""
    return _PREPARED_READER if format == PREPARED else READERS[format]


def read_labels(format: str, folder: Path, classes: Sequence[str], rule: SplitRule | None) -> Labels:
    """Read labels without decoding pictures; without a rule, `labels.divider.rule` is the one that fits the folder."""
    reader = reader_of(format)
    divider = Divider(folder, reader.images(folder), rule)
    splits = reader.read(folder, classes, divider)
    for split, number in divider.num_excluded.items():
        splits[split].num_images_excluded = number
    return Labels(splits, [problem for content in splits.values() for problem in content.problems], divider)


def _repeated_pictures(labels: Labels) -> list[Problem]:
    """Return pictures of other names with the same bytes: a leak between splits, a warning within one."""
    owners = {record.file_name: split for split, content in labels.splits.items() for record in content.images}
    images, known = labels.divider.images, labels.divider.digests
    found: Mapping[str, str | None] = digests(images, list(owners)) if owners.keys() - known.keys() else known
    first: dict[str, str] = {}
    problems = []
    for name, split in owners.items():
        digest = found[name]
        other = first.setdefault(digest, name) if digest is not None else name
        if other == name:
            continue
        same, place = f"the same bytes as {other!r}", images / name
        if split == owners[other]:
            rule = f"{same}, also in split {split!r}: one picture counts twice"
            problems.append(Problem(place, None, rule, "Kept: remove one if that is not meant", "warning"))
        else:
            rule = f"leak: split {split!r} holds {same} in {owners[other]!r}, so a score would not be fair"
            problems.append(Problem(place, None, rule, "Keep both in one split, or one of them"))
    return problems

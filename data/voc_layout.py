"""Where the parts of a VOC folder lie: XML files, pictures, lists of the splits."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.label_files import SPLIT_NAMES
from data.pictures import files_below, is_hidden, is_picture

_LAYOUTS = (("Annotations", "JPEGImages", "ImageSets/Main"), ("annotations", "images", "splits"))
# Of these the names are taken in any case.
_MIXED = (*_LAYOUTS, ("annotations", "images", "ImageSets/Main"), ("annotations", "JPEGImages", "splits"))


class VocPlace(NamedTuple):
    """XML files and the pictures that they are of; one folder where they lie side by side."""

    annotations: Path
    images: Path

    @property
    def is_there(self) -> bool:
        """Whether both folders are."""
        return self.annotations.is_dir() and self.images.is_dir()

    def xml_files(self) -> dict[str, list[str]]:
        """Return the names of the XML files by stem; there is more than one of a stem only where their cases differ."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(os.listdir(self.annotations)) if self.annotations.is_dir() else ():
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == ".xml" and not is_hidden(name):
                found[stem].append(name)
        return dict(found)


class VocLayout(NamedTuple):
    """The places of a folder, one or one for each split; names of pictures are relative to `images`.

    `lists` is the folder of the splits' lists, None where folders say which split a picture is in.
    """

    images: Path
    lists: Path | None
    places: tuple[VocPlace, ...]

    def told_in(self, split: str) -> Path:
        """Path of the list of a split's pictures, or of the folder of all pictures where there are no lists."""
        return self.lists / f"{split}.txt" if self.lists is not None else self.images

    def pictures(self) -> tuple[list[dict[str, list[str]]], list[str]]:
        """Return the names of each place's pictures by stem, and those of pictures that are in no place.

        A place's pictures lie in its folder of pictures or, where that has none itself, in folders below it.
        """
        names = [name for name in files_below(self.images) if is_picture(name)]
        places = [self._of(place, names) for place in self.places]
        taken = {name for found in places for group in found.values() for name in group}
        return places, [name for name in names if name not in taken]

    def _of(self, place: VocPlace, names: Sequence[str]) -> dict[str, list[str]]:
        prefix = "" if place.images == self.images else f"{place.images.relative_to(self.images).as_posix()}/"
        below = [name for name in names if name.startswith(prefix)]
        found: dict[str, list[str]] = defaultdict(list)
        for name in [name for name in below if "/" not in name.removeprefix(prefix)] or below:
            found[PurePosixPath(name).stem].append(name)
        return dict(found)


def voc_folder(folder: Path) -> VocLayout:
    """Return the layout of a folder, or the one that it has most of, with folders that are not there.

    Looked for are folders of XML files beside folders of pictures, XML files beside their pictures, and either in
    folders that are called like splits.
    """
    place, lists = _parts(folder)
    if place.is_there:
        return VocLayout(place.images, lists, (place,))
    if _is_side_by_side(folder):
        return VocLayout(folder, lists, (VocPlace(folder, folder),))
    places = tuple(_split_places(folder))
    return VocLayout(folder, None, places) if places else VocLayout(place.images, lists, (place,))


def _split_places(folder: Path) -> Iterator[VocPlace]:
    for name, subfolder in sorted(_subfolders(folder).items()):
        if name in SPLIT_NAMES:
            place, _ = _parts(subfolder)
            if place.is_there:
                yield place
            elif _is_side_by_side(subfolder):
                yield VocPlace(subfolder, subfolder)


def _parts(folder: Path) -> tuple[VocPlace, Path]:
    """Return the place and the folder of lists in the layout of which more is there.

    Names exactly as in a layout come before others: that more names are known must not change how a folder is read.
    """
    exact = _fullest([[folder / part for part in parts] for parts in _LAYOUTS])
    if exact[0].is_there:
        return exact
    subfolders = _subfolders(folder)
    mixed = _fullest([[_in_any_case(folder, part, subfolders) for part in parts] for parts in _MIXED])
    return mixed if mixed[0].is_there else exact


def _fullest(layouts: list[list[Path]]) -> tuple[VocPlace, Path]:
    annotations, images, lists = max(layouts, key=lambda parts: sum(part.is_dir() for part in parts))
    return VocPlace(annotations, images), lists


def _in_any_case(folder: Path, name: str, subfolders: dict[str, Path]) -> Path:
    first, _, rest = name.partition("/")
    found = subfolders.get(first.lower(), folder / first)
    return _in_any_case(found, rest, _subfolders(found)) if rest else found


def _subfolders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by their names in lower case."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted((entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)), reverse=True)
    return {name.lower(): folder / name for name in names}


def _is_side_by_side(folder: Path) -> bool:
    """Whether an XML file lies beside a picture of the same name."""
    stems = VocPlace(folder, folder).xml_files().keys()
    return bool(stems) and any(is_picture(name) and os.path.splitext(name)[0] in stems for name in os.listdir(folder))

"""The Pascal VOC layout: one XML file per picture, and lists that say which picture belongs to which split.

Read are `Annotations/*.xml JPEGImages/* ImageSets/Main/{train,val,test}.txt` and the flat
`annotations/*.xml images/* splits/{train,val,test}.txt`, these names in any case, and XML files beside their pictures.
Pictures may lie in folders below, as by class: the XML has the base name. A list names one picture a line, with or
without extension; pictures in no list are unassigned. Without lists a picture belongs to the split whose name (train,
val or valid or validation, test) its outermost folder has, and the whole layout may lie in each of such folders.

Coordinates count pixels from 1 and include both ends (Everingham et al., VOC2007 development kit): a box covers the
columns xmin..xmax, so x = xmin - 1 and w = xmax - xmin + 1. That is the one convention here. Files of tools that count
from 0 show at the picture's edge: their xmin = 0 is clipped and counted, and the rest is shifted by one pixel.

A `difficult` object becomes a crowd box: a detection of its class on it is neither right nor wrong, missing it costs
nothing, and training takes it neither for an object nor for background.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.cleaning import ImageBoxes
from data.dividing import UNASSIGNED, Divider
from data.label_files import MAX_LIST_BYTES, SPLIT_NAMES, UnreadableFile, is_safe_name, number, read_lines, whole
from data.pictures import MAX_SIDE_PX, SUFFIXES, files_below, is_hidden, is_picture
from data.records import SPLITS, ImageRecord, Split
from data.voc_xml import SIDES, UnreadableXml, VocAnnotation, VocObject, read_annotation

_LAYOUTS = (("Annotations", "JPEGImages", "ImageSets/Main"), ("annotations", "images", "splits"))
# Of these the names are taken in any case.
_MIXED = (*_LAYOUTS, ("annotations", "images", "ImageSets/Main"), ("annotations", "JPEGImages", "splits"))
_NUM_EXAMPLES = 3


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


def recognise(folder: Path) -> tuple[bool, str]:
    """Whether a folder is in this layout, and what was found or missed."""
    places = [place for place in voc_folder(folder).places if place.is_there]
    if not places:
        return False, "no Annotations/ beside JPEGImages/, nor annotations/ beside images/, nor XML beside pictures"
    counts = [sum(len(names) for names in place.xml_files().values()) for place in places]
    found = [f"{_shown(folder, place)} {count or 'no'} XML files" for place, count in zip(places, counts, strict=True)]
    return any(counts), ", ".join(found)


def _shown(folder: Path, place: VocPlace) -> str:
    annotations, images = (path.relative_to(folder).as_posix() for path in place)
    return f"{annotations}/ beside {images}/ holds" if annotations != images else f"pictures in {images}/ lie beside"


def read_voc(folder: Path, classes: Sequence[str], divide: Divider) -> dict[str, Split]:
    """Read the three splits; every fault becomes a `Problem` of its split, nothing is raised.

    Pictures are found by the lists' names and classes by the XML's `name`. Boxes are clipped to their picture and
    counted; those without area inside it, and repetitions of a box of the same class (the first stays), are left out
    and counted. Image ids run through all splits, in the order of the names.
    """
    return _Reader(folder, classes).read(divide)


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the class names of all objects, sorted; what cannot be read is left to `read_voc` to report.

    Of pictures in no list only where one of the three lists is lacking.
    """
    reader = _Reader(folder, ())
    listed = reader.listed()
    if listed.keys() >= {*SPLITS}:
        listed.pop(UNASSIGNED, None)
    names: set[str] = set()
    for name in (name for names in listed.values() for name in names):
        try:
            annotation = read_annotation(reader.xml_file(name))
        except UnreadableXml:
            continue
        names |= {name for name in (found.fields.get("name") for found in annotation.objects) if name}
    return tuple(sorted(names))


class _Reader:
    """Reads one folder and collects the problems of each split."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.layout = voc_folder(folder)
        self.labels = {name: label for label, name in enumerate(classes)}
        self.splits: dict[str, Split] = {split: Split() for split in SPLITS}
        self.pictures, self.elsewhere = self.layout.pictures()
        self.xml_files = [place.xml_files() for place in self.layout.places]
        self.place_of = {
            name: place for place, found in enumerate(self.pictures) for names in found.values() for name in names
        }

    def read(self, divide: Divider) -> dict[str, Split]:
        listed = self.listed()
        if not listed:
            return self.splits
        divided = divide(listed)
        self._count_unused({name for names in divided.values() for name in names})
        image_id = 0
        for split, pictures in divided.items():
            content = self.splits[split]
            for name in sorted(pictures, key=lambda name: (PurePosixPath(name).stem, name)):
                image_id += 1
                image = self._image(content, image_id, name)
                if image is not None:
                    content.images.append(image)
            num_difficult = sum(box.is_crowd for image in content.images for box in image.boxes)
            if num_difficult:
                rule = f"{num_difficult} boxes are marked difficult, so scoring must neither reward nor punish them"
                content.warn(self.layout.told_in(split), rule, "Kept as crowd boxes when prepared")
        return self.splits

    def listed(self) -> dict[str, list[str]]:
        """Return the pictures by split, UNASSIGNED where neither list nor folder says; none where a part is lacking."""
        first, layout = self.splits[SPLITS[0]], self.layout
        missing = [part for place in layout.places for part in place if not part.is_dir()]
        for part in missing:
            first.report(part, "a VOC folder holds pictures and XML files", "Add this folder or name another format")
        if missing:
            return {}
        if self.elsewhere:
            example = repr(self.elsewhere[0])
            rule = f"{len(self.elsewhere)} pictures lie outside the folders that are read, for example {example}"
            first.warn(layout.images, rule, "Left out when prepared: move them to the others to use them")
        owners: dict[str, str] = {}
        listed: dict[str, list[str]] = {}
        for split in SPLITS if layout.lists is not None else ():
            if layout.told_in(split).exists():
                listed[split] = list(self._list(split, owners))
        has_lists = bool(listed)
        for found in self.pictures:
            for stem, files in found.items():
                if stem not in owners:
                    for name in self._unlisted(stem, files):
                        outermost = "" if has_lists else name.partition("/")[0].lower()
                        listed.setdefault(SPLIT_NAMES.get(outermost, UNASSIGNED), []).append(name)
        return listed

    def xml_file(self, picture: str) -> Path:
        """Return where a picture's annotation is, or should be."""
        place, stem = self.place_of[picture], PurePosixPath(picture).stem
        return self.layout.places[place].annotations / self.xml_files[place].get(stem, [f"{stem}.xml"])[0]

    def _unlisted(self, stem: str, files: list[str]) -> Iterator[str]:
        content, images = self.splits[SPLITS[0]], self.layout.images
        if len(files) > 1:
            rule = f"{', '.join(files)} share the annotation file {stem}.xml"
            content.report(images, rule, "Keep one of these pictures")
        if is_safe_name(files[0]):
            yield files[0]
        else:
            content.report(images, f"{files[0]!r} is not a file name that can be written down", "Rename the picture")

    def _count_unused(self, used: set[str]) -> None:
        for place, pictures, xml_files in zip(self.layout.places, self.pictures, self.xml_files, strict=True):
            stems = {stem for stem, names in pictures.items() if not used.isdisjoint(names)}
            unused = sorted(xml_files.keys() - stems)
            if unused:
                examples = ", ".join(unused[:_NUM_EXAMPLES])
                rule = f"{len(unused)} files are of no picture in a split, for example {examples}"
                remedy = "Left out when prepared: add or list the pictures to use them"
                self.splits[SPLITS[0]].warn(place.annotations, rule, remedy)

    def _list(self, split: str, owners: dict[str, str]) -> Iterator[str]:
        """Yield the pictures of one list that are there; `owners` says where a stem was listed first."""
        path, content, pictures = self.layout.told_in(split), self.splits[split], self.pictures[0]
        try:
            names = [(line, text.strip()) for line, text in read_lines(path, MAX_LIST_BYTES)]
        except UnreadableFile as error:
            content.report(path, str(error), "Write the list again")
            return
        if not names:
            content.report(path, "the split has no images", "Training needs train, val and test images")
        for line, name in names:
            if not is_safe_name(name) or "/" in name:
                rule = f"{name!r} is not the bare name of a file"
                content.report(path, rule, "Name a picture without any folder", line=line)
                continue
            stem = name if name in pictures else _without_suffix(name)
            files = [file for file in pictures.get(stem, []) if is_safe_name(file)]
            if stem in owners:
                rule = f"{name!r} is listed in {owners[stem]} already, so it would count twice or leak"
                content.report(path, rule, "Keep it in one list, once", line=line)
                continue
            owners[stem] = f"{path.name}:{line}"
            if len(files) == 1:
                yield files[0]
            elif files:
                rule = f"{name!r} could be any of {', '.join(files)}"
                content.report(path, rule, "Keep one of these pictures", line=line)
            else:
                rule = f"there is no picture {self.layout.images.name}/{stem} with one of {', '.join(sorted(SUFFIXES))}"
                content.report(path, rule, "Add the picture or remove the line", line=line)

    def _image(self, content: Split, image_id: int, picture: str) -> ImageRecord | None:
        """Return the record of a listed picture, or None when its XML is unusable."""
        stem, path = PurePosixPath(picture).stem, self.xml_file(picture)
        others = self.xml_files[self.place_of[picture]].get(stem, [])[1:]
        if others:
            content.report(path, f"{', '.join(others)} is of the same picture", "Keep one of these files")
        try:
            annotation = read_annotation(path)
        except UnreadableXml as error:
            remedy = "Provide a sound VOC annotation or unlist the picture"
            content.report(path, str(error), remedy, line=error.line, column=error.column)
            return None
        width, height = (whole(annotation.fields.get(f"size/{side}")) for side in ("width", "height"))
        if width is None or height is None or min(width, height) < 1 or max(width, height) > MAX_SIDE_PX:
            rule = f"<size> must have a width and height of whole pixels from 1 to {MAX_SIDE_PX}"
            content.report(path, rule, "Correct it")
            return None
        self._compare_file_name(content, path, annotation, stem)
        boxes = ImageBoxes(content, width, height)
        for found in annotation.objects:
            self._box(path, found, boxes)
        return boxes.record(image_id, picture)

    def _compare_file_name(self, content: Split, path: Path, annotation: VocAnnotation, stem: str) -> None:
        name = annotation.fields.get("filename")
        if not name:
            return
        if not is_safe_name(name):
            content.report(path, f"filename {name!r} leaves the images folder", "Use the picture's bare name")
        elif stem not in (name, PurePosixPath(name).stem):
            rule = f"filename {name!r} is not that of the picture {stem!r}, which the list names"
            content.warn(path, rule, "The list decides: see that these are its boxes")

    def _box(self, path: Path, found: VocObject, boxes: ImageBoxes) -> None:
        """Add one object's box to `boxes`, or report why not."""
        name, difficult = found.fields.get("name"), found.fields.get("difficult") or "0"
        corners = [number(found.fields.get(f"bndbox/{side}")) for side in SIDES]
        if not name or difficult not in ("0", "1") or None in corners:
            rule = "an object needs a name, four numbers in its bndbox and, if any, a difficult of 0 or 1"
            boxes.content.report(path, rule, "Correct it", line=found.line)
            return
        if name not in self.labels:
            rule = f"{name!r} is not one of the card's classes"
            boxes.content.report(path, rule, f"Known: {', '.join(self.labels)}", line=found.line)
            return
        xmin, ymin, xmax, ymax = (corner for corner in corners if corner is not None)
        box = (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1)
        shown = f"box {[found.fields[f'bndbox/{side}'] for side in SIDES]} (xmin, ymin, xmax, ymax)"
        boxes.add(path, found.line, shown, self.labels[name], name, box, is_crowd=difficult == "1")


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in SUFFIXES else name

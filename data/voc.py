"""The Pascal VOC layout: one XML file per picture, and lists that say which picture belongs to which split.

Read are `Annotations/*.xml JPEGImages/* ImageSets/Main/{train,val,test}.txt` and the flat
`annotations/*.xml images/* splits/{train,val,test}.txt`. A list names one picture a line, with or without extension;
pictures in no list are unassigned.

Coordinates count pixels from 1 and include both ends (Everingham et al., VOC2007 development kit): a box covers the
columns xmin..xmax, so x = xmin - 1 and w = xmax - xmin + 1. That is the one convention here. Files of tools that count
from 0 show at the picture's edge: their xmin = 0 is clipped and counted, and the rest is shifted by one pixel.

A `difficult` object becomes a crowd box: a detection of its class on it is neither right nor wrong, missing it costs
nothing, and training takes it neither for an object nor for background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.cleaning import ImageBoxes
from data.dividing import UNASSIGNED, Divider
from data.label_files import MAX_LIST_BYTES, UnreadableFile, is_safe_name, number, read_lines, whole
from data.pictures import MAX_SIDE_PX, SUFFIXES, is_picture
from data.records import SPLITS, ImageRecord, Split
from data.voc_xml import SIDES, UnreadableXml, VocAnnotation, VocObject, read_annotation

_LAYOUTS = (("Annotations", "JPEGImages", "ImageSets/Main"), ("annotations", "images", "splits"))
_NUM_EXAMPLES = 3


class VocFolder(NamedTuple):
    """Where the three parts of a VOC folder lie."""

    annotations: Path
    images: Path
    lists: Path

    def list_file(self, split: str) -> Path:
        """Path of the list of a split's pictures."""
        return self.lists / f"{split}.txt"


def voc_folder(folder: Path) -> VocFolder:
    """Return the parts of `folder` in the layout of which more is there."""
    layouts = [VocFolder(*(folder / part for part in parts)) for parts in _LAYOUTS]
    return max(layouts, key=lambda layout: sum(part.is_dir() for part in layout))


def recognise(folder: Path) -> tuple[bool, str]:
    """Whether a folder is in this layout, and what was found or missed."""
    parts = voc_folder(folder)
    if not parts.images.is_dir() or not parts.annotations.is_dir():
        return False, "no Annotations/ beside JPEGImages/, nor annotations/ beside images/"
    num_files = sum(1 for _ in parts.annotations.glob("*.xml"))
    found = f"{parts.annotations.name}/ beside {parts.images.name}/ holds {num_files or 'no'} XML files"
    return num_files > 0, found


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
    listed = _Reader(folder, ()).listed()
    if listed.keys() >= {*SPLITS}:
        listed.pop(UNASSIGNED, None)
    names: set[str] = set()
    for stem in (PurePosixPath(name).stem for names in listed.values() for name in names):
        try:
            annotation = read_annotation(voc_folder(folder).annotations / f"{stem}.xml")
        except UnreadableXml:
            continue
        names |= {name for name in (found.fields.get("name") for found in annotation.objects) if name}
    return tuple(sorted(names))


class _Reader:
    """Reads one folder and collects the problems of each split."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = voc_folder(folder)
        self.labels = {name: label for label, name in enumerate(classes)}
        self.splits: dict[str, Split] = {split: Split() for split in SPLITS}
        self.pictures: dict[str, list[str]] = {}

    def read(self, divide: Divider) -> dict[str, Split]:
        listed = self.listed()
        if not listed:
            return self.splits
        divided = divide(listed)
        self._count_unused({PurePosixPath(name).stem for names in divided.values() for name in names})
        image_id = 0
        for split, pictures in divided.items():
            content = self.splits[split]
            for name in sorted(pictures, key=lambda name: PurePosixPath(name).stem):
                image_id += 1
                image = self._image(content, image_id, name)
                if image is not None:
                    content.images.append(image)
            num_difficult = sum(box.is_crowd for image in content.images for box in image.boxes)
            if num_difficult:
                rule = f"{num_difficult} boxes are marked difficult, so scoring must neither reward nor punish them"
                content.warn(self.folder.list_file(split), rule, "Kept as crowd boxes when prepared")
        return self.splits

    def listed(self) -> dict[str, list[str]]:
        """Return the pictures of each split that has a list, and those of no list; nothing where a part is lacking."""
        first = self.splits[SPLITS[0]]
        missing = [part for part in (self.folder.annotations, self.folder.images) if not part.is_dir()]
        for part in missing:
            first.report(part, "a VOC folder holds pictures and XML files", "Add this folder or name another format")
        if missing:
            return {}
        for path in sorted(self.folder.images.iterdir()):
            if is_picture(path.name):
                self.pictures.setdefault(path.stem, []).append(path.name)
        owners: dict[str, str] = {}
        lists = [split for split in SPLITS if self.folder.list_file(split).exists()]
        listed = {split: [self.pictures[stem][0] for stem in self._list(split, owners)] for split in lists}
        unlisted = {stem: files for stem, files in self.pictures.items() if stem not in owners}
        return listed | ({UNASSIGNED: self._unlisted(unlisted)} if unlisted else {})

    def _unlisted(self, unlisted: dict[str, list[str]]) -> list[str]:
        for stem, files in unlisted.items():
            if len(files) > 1:
                rule = f"{', '.join(files)} share the annotation file {stem}.xml"
                self.splits[SPLITS[0]].report(self.folder.images, rule, "Keep one of these pictures")
            if not is_safe_name(files[0]):
                rule = f"{files[0]!r} is not a file name that can be written down"
                self.splits[SPLITS[0]].report(self.folder.images, rule, "Rename the picture")
        return [files[0] for files in unlisted.values() if is_safe_name(files[0])]

    def _count_unused(self, used: set[str]) -> None:
        unused = sorted({path.stem for path in self.folder.annotations.glob("*.xml")} - used)
        if unused:
            rule = f"{len(unused)} files are of no picture in a split, for example {', '.join(unused[:_NUM_EXAMPLES])}"
            remedy = "Left out when prepared: add or list the pictures to use them"
            self.splits[SPLITS[0]].warn(self.folder.annotations, rule, remedy)

    def _list(self, split: str, owners: dict[str, str]) -> Iterator[str]:
        """Yield the stems of one list whose picture is there; `owners` says where a stem was listed first."""
        path, content = self.folder.list_file(split), self.splits[split]
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
            stem = name if name in self.pictures else _without_suffix(name)
            files = self.pictures.get(stem, [])
            if stem in owners:
                rule = f"{name!r} is listed in {owners[stem]} already, so it would count twice or leak"
                content.report(path, rule, "Keep it in one list, once", line=line)
                continue
            owners[stem] = f"{path.name}:{line}"
            if len(files) == 1:
                yield stem
            elif files:
                rule = f"{name!r} could be any of {', '.join(files)}"
                content.report(path, rule, "Keep one of these pictures", line=line)
            else:
                rule = f"there is no picture {self.folder.images.name}/{stem} with one of {', '.join(sorted(SUFFIXES))}"
                content.report(path, rule, "Add the picture or remove the line", line=line)

    def _image(self, content: Split, image_id: int, picture: str) -> ImageRecord | None:
        """Return the record of a listed picture, or None when its XML is unusable."""
        stem = PurePosixPath(picture).stem
        path = self.folder.annotations / f"{stem}.xml"
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

"""The Pascal VOC layout: one XML file per picture, and lists that say which picture belongs to which split.

Read are `Annotations/*.xml JPEGImages/* ImageSets/Main/{train,val,test}.txt` and the flat
`annotations/*.xml images/* splits/{train,val,test}.txt`. A list names one picture a line, with or without extension.

Coordinates count pixels from 1 and include both ends (Everingham et al., VOC2007 development kit): a box covers the
columns xmin..xmax, so x = xmin - 1 and w = xmax - xmin + 1. That is the one convention here. Files of tools that count
from 0 show at the picture's edge: their xmin = 0 is clipped and counted, and the rest is shifted by one pixel.

A `difficult` object becomes a crowd box: a detection of its class on it is neither right nor wrong, missing it costs
nothing, and training takes it neither for an object nor for background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.coco import is_safe_name
from data.problems import Problem
from data.records import SPLITS, Box, ImageRecord, Split, clip_xywh
from data.voc_xml import SIDES, UnreadableXml, VocAnnotation, VocObject, read_annotation

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
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


def read_voc(folder: Path, classes: Sequence[str]) -> dict[str, Split]:
    """Read the three splits; every fault becomes a `Problem` of its split, nothing is raised.

    Pictures are found by the lists' names and classes by the XML's `name`. Boxes are clipped to their picture and
    counted; those without area inside it, and repetitions of a box of the same class (the first stays), are left out
    and counted. Image ids run through all splits, in the order of the names.
    """
    return _Reader(folder, classes).read()


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the class names of all listed pictures, sorted; what cannot be read is left to `read_voc` to report."""
    reader = _Reader(folder, ())
    return tuple(sorted(reader.class_names()))


class _Reader:
    """Reads one folder and collects the problems of each split."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = voc_folder(folder)
        self.labels = {name: label for label, name in enumerate(classes)}
        self.splits: dict[str, Split] = {split: Split() for split in SPLITS}
        self.pictures: dict[str, list[str]] = {}

    def read(self) -> dict[str, Split]:
        listed = self._listed()
        image_id = 0
        for split, stems in listed.items():
            num_difficult = 0
            for stem in sorted(stems):
                image_id += 1
                image = self._image(self.splits[split], image_id, stem)
                if image is not None:
                    self.splits[split].images.append(image)
                    num_difficult += sum(box.is_crowd for box in image.boxes)
            if num_difficult:
                rule = f"{num_difficult} boxes are marked difficult, so scoring must neither reward nor punish them"
                path = self.folder.list_file(split)
                _fault(self.splits[split], path, None, rule, "Kept as crowd boxes when prepared", warning=True)
        return self.splits

    def class_names(self) -> set[str]:
        names: set[str] = set()
        for stem in (stem for stems in self._listed().values() for stem in stems):
            try:
                annotation = read_annotation(self._xml(stem))
            except UnreadableXml:
                continue
            names |= {name for name in (found.fields.get("name") for found in annotation.objects) if name}
        return names

    def _xml(self, stem: str) -> Path:
        return self.folder.annotations / f"{stem}.xml"

    def _listed(self) -> dict[str, list[str]]:
        """Return the stems of each split's pictures; a folder that lacks a part is reported and has none."""
        first = self.splits[SPLITS[0]]
        for part in (self.folder.annotations, self.folder.images):
            if not part.is_dir():
                _fault(first, part, None, "a VOC folder holds pictures and XML files", "Add this folder or name COCO")
        for split in SPLITS:
            path = self.folder.list_file(split)
            if not path.is_file():
                rule = "pinned split lists are required, so that every run trains and scores on the same pictures"
                remedy = "Write train.txt, val.txt and test.txt there, one picture's name a line"
                _fault(self.splits[split], path, None, rule, remedy)
        if any(content.problems for content in self.splits.values()):
            return {}
        for path in sorted(self.folder.images.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                self.pictures.setdefault(path.stem, []).append(path.name)
        owners: dict[str, str] = {}
        listed: dict[str, list[str]] = {split: list(self._list(split, owners)) for split in SPLITS}
        xml = {path.stem for path in self.folder.annotations.glob("*.xml")}
        for path, stems in ((self.folder.images, set(self.pictures)), (self.folder.annotations, xml)):
            unlisted = sorted(stems - set(owners))
            if unlisted:
                rule = f"{len(unlisted)} files are in no list, for example {', '.join(unlisted[:_NUM_EXAMPLES])}"
                _fault(first, path, None, rule, "Left out when prepared: list them to use them", warning=True)
        return listed

    def _list(self, split: str, owners: dict[str, str]) -> Iterator[str]:
        """Yield the stems of one list whose picture is there; `owners` says where a stem was listed first."""
        path, content = self.folder.list_file(split), self.splits[split]
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            _fault(content, path, None, f"not a text file in UTF-8: {error}", "Write the list again")
            return
        names = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        if not names:
            _fault(content, path, None, "the split has no images", "Training needs train, val and test images")
        for number, name in names:
            if not is_safe_name(name) or "/" in name:
                rule = f"{name!r} is not the bare name of a file"
                _fault(content, path, number, rule, "Name a picture without any folder")
                continue
            stem = name if name in self.pictures else _without_suffix(name)
            files = self.pictures.get(stem, [])
            if stem in owners:
                rule = f"{name!r} is listed in {owners[stem]} already, so it would count twice or leak"
                _fault(content, path, number, rule, "Keep it in one list, once")
                continue
            owners[stem] = f"{path.name}:{number}"
            if len(files) == 1:
                yield stem
            elif files:
                rule = f"{name!r} could be any of {', '.join(files)}"
                _fault(content, path, number, rule, "Keep one of these pictures")
            else:
                rule = f"there is no picture {self.folder.images.name}/{stem} with one of {', '.join(sorted(SUFFIXES))}"
                _fault(content, path, number, rule, "Add the picture or remove the line")

    def _image(self, content: Split, image_id: int, stem: str) -> ImageRecord | None:
        """Return the record of a listed picture, or None when its XML is unusable."""
        path, picture = self._xml(stem), self.pictures[stem][0]
        try:
            annotation = read_annotation(path)
        except UnreadableXml as error:
            _fault(content, path, error.line, str(error), "Provide a sound VOC annotation or unlist the picture")
            return None
        width, height = (_number(annotation.fields.get(f"size/{side}")) for side in ("width", "height"))
        if not (width and height and min(width, height) > 0 and width.is_integer() and height.is_integer()):
            _fault(content, path, None, "<size> must have a width and height of whole pixels above 0", "Correct it")
            return None
        self._compare_file_name(content, path, annotation, stem)
        boxes: list[Box] = []
        for found in annotation.objects:
            self._box(content, path, found, int(width), int(height), boxes)
        return ImageRecord(image_id, picture, int(width), int(height), tuple(boxes), ())

    def _compare_file_name(self, content: Split, path: Path, annotation: VocAnnotation, stem: str) -> None:
        name = annotation.fields.get("filename")
        if not name:
            return
        if not is_safe_name(name):
            _fault(content, path, None, f"filename {name!r} leaves the images folder", "Use the picture's bare name")
        elif stem not in (name, PurePosixPath(name).stem):
            rule = f"filename {name!r} is not that of the picture {stem!r}, which the list names"
            _fault(content, path, None, rule, "The list decides: see that these are its boxes", warning=True)

    def _box(
        self, content: Split, path: Path, found: VocObject, width_px: int, height_px: int, boxes: list[Box]
    ) -> None:
        """Append one object's box to `boxes`, or count or report why not."""
        name, difficult = found.fields.get("name"), found.fields.get("difficult") or "0"
        corners = [_number(found.fields.get(f"bndbox/{side}")) for side in SIDES]
        if not name or difficult not in ("0", "1") or None in corners:
            rule = "an object needs a name, four numbers in its bndbox and, if any, a difficult of 0 or 1"
            _fault(content, path, found.line, rule, "Correct it")
            return
        xmin, ymin, xmax, ymax = (corner for corner in corners if corner is not None)
        box = (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1)
        corners_text = f"box {[found.fields[f'bndbox/{side}'] for side in SIDES]} (xmin, ymin, xmax, ymax)"
        clipped = clip_xywh(box, width_px, height_px)
        if clipped is None:
            content.num_boxes_excluded += 1
            rule = f"{corners_text} has no area inside its {width_px}x{height_px} px image"
            _fault(content, path, found.line, rule, "Left out when prepared: mend or delete it", warning=True)
            return
        if name not in self.labels:
            rule = f"{name!r} is not one of the card's classes"
            _fault(content, path, found.line, rule, f"Known: {', '.join(self.labels)}")
            return
        kept = Box(self.labels[name], clipped, round(clipped[2] * clipped[3], 2), difficult == "1")
        if any(other[:2] == kept[:2] for other in boxes):
            content.num_boxes_excluded += 1
            rule = f"{corners_text} of class {name!r} occurs twice"
            _fault(content, path, found.line, rule, "Kept once when prepared: delete the repetition", warning=True)
            return
        if clipped != tuple(round(side, 2) for side in box):
            content.num_boxes_clipped += 1
            rule = f"{corners_text} sticks out of its {width_px}x{height_px} px image"
            _fault(content, path, found.line, rule, "Clipped when prepared", warning=True)
        boxes.append(kept)


def _fault(content: Split, path: Path, line: int | None, rule: str, remedy: str, *, warning: bool = False) -> None:
    content.problems.append(Problem(path, line, rule, remedy, "warning" if warning else "error"))


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in SUFFIXES else name


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if isfinite(number) else None

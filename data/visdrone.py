"""VisDrone-DET: `images/*.jpg` beside `annotations/*.txt`, in a folder for each split.

A row is `x,y,w,h,score,category,truncation,occlusion`, x and y counted from 0, some rows with a comma at the end.
Category 0 is an ignore region, 1..10 are the classes. Category 11, `others`, is neither scored nor ignored by the
official toolkit (a detection there is a false positive), so it becomes background, counted. A score of 0 marks a box
that evaluation ignores: like VOC's `difficult` it becomes a crowd box.

Facts: VisDrone/VisDrone2018-DET-toolkit; Zhu et al. 2021.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data.cleaning import ImageBoxes, read_pictures, whole_numbers
from data.dividing import UNASSIGNED, Divider
from data.label_files import SPLIT_NAMES, UnreadableFile, is_safe_name, read_rows, shared, whole
from data.pictures import is_hidden, is_picture
from data.records import SPLITS, Split

CLASSES = (
    "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor",
)  # fmt: skip
_FIELDS = ("x", "y", "w", "h", "score", "category", "truncation", "occlusion")
_IGNORE_REGION, _OTHERS = 0, len(CLASSES) + 1
_NUM_EXAMPLES = 3


def recognise(folder: Path) -> tuple[bool, str]:
    """Whether a folder is in this layout, and what was found or missed."""
    places = _places(folder)
    if not places:
        return False, "no folder with annotations/*.txt beside images/, nor folders for the splits with these"
    for place in places:
        path = next(iter(sorted((place / "annotations").glob("*.txt"))))
        try:
            row = next(iter(read_rows(path, "comma")), None)
        except UnreadableFile as error:
            return False, f"{path.name}: {error}"
        if row is not None and (len(row.fields) != len(_FIELDS) or None in (whole(field.text) for field in row.fields)):
            return False, f"{path.name} has no rows of 8 whole numbers between commas"
    names = ", ".join(place.relative_to(folder).as_posix() for place in places)
    return True, f"rows of 8 numbers in annotations/*.txt beside images/ in {names}"


def class_names(folder: Path) -> tuple[str, ...]:  # noqa: ARG001
    """Return the benchmark's ten classes, in its order."""
    return CLASSES


def read_visdrone(folder: Path, classes: Sequence[str], divide: Divider) -> dict[str, Split]:
    """Read the pictures of every split; every fault becomes a `Problem` of its split, nothing is raised.

    Sizes are those of the pictures' headers. A folder belongs to the split that its name has as a word, if to one.
    """
    return _Reader(folder, classes).read(divide)


def read_annotations(path: Path, classes: Sequence[str], boxes: ImageBoxes) -> Counter[int]:
    """Read the file of one picture into `boxes`; return how many sound rows it has by category."""
    counts: Counter[int] = Counter()
    labels = {name: label for label, name in enumerate(classes)}
    for row, (x, y, w, h, score, category, *_) in whole_numbers(path, _FIELDS, boxes.content):
        shown, box = f"box {[x, y, w, h]} (x, y, w, h)", (float(x), float(y), float(w), float(h))
        name = CLASSES[category - 1] if 1 <= category <= len(CLASSES) else None
        if category == _IGNORE_REGION:
            boxes.ignore(path, row.line, shown, box)
        elif name in labels:
            boxes.add(path, row.line, shown, labels[name], name, box, is_crowd=score == 0)
        elif category != _OTHERS:
            rule = f"category {category} is none of the card's classes, 0 (ignore region) or 11 (others)"
            boxes.content.report(path, rule, f"Known: {', '.join(classes)}", line=row.line, column=row.fields[5].column)
            continue
        counts[category] += 1
    return counts


class _Reader:
    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self.splits: dict[str, Split] = {split: Split() for split in SPLITS}

    def read(self, divide: Divider) -> dict[str, Split]:
        others: dict[str, int] = dict.fromkeys(SPLITS, 0)
        divided = divide(self._listed())
        split_of = {name: split for split, names in divided.items() for name in names}

        def labels(name: str, boxes: ImageBoxes) -> None:
            counts = read_annotations(self.folder / _annotation(name), self.classes, boxes)
            others[split_of[name]] += counts[_OTHERS]

        read_pictures(self.folder, self.splits, divided, labels)
        for split, number in others.items():
            if number:
                rule = f"{number} boxes of split {split!r} are of category 11 (others), neither scored nor ignored"
                self.splits[split].warn(self.folder, rule, "Left out when prepared: background to training and scoring")
            num_crowd = sum(box.is_crowd for image in self.splits[split].images for box in image.boxes)
            if num_crowd:
                rule = (
                    f"{num_crowd} boxes of split {split!r} have score 0, so scoring must neither reward nor punish them"
                )
                self.splits[split].warn(self.folder, rule, "Kept as crowd boxes when prepared")
        return self.splits

    def _listed(self) -> dict[str, list[str]]:
        listed: dict[str, list[str]] = {}
        places = _places(self.folder)
        if not places:
            self.splits["train"].report(self.folder, "a VisDrone folder holds images/ and annotations/", "Add them")
        for place in places:
            split = _split_of(place.name) if place != self.folder else UNASSIGNED
            content = self.splits.get(split, self.splits["train"])
            names = _pictures(place)
            if not names:
                content.report(place / "images", "the split has no images", "Add the pictures")
            for name in names:
                if not is_safe_name(name):
                    content.report(place, f"{name!r} is not a file name that can be written down", "Rename the picture")
            for annotation, owners in shared(
                filter(is_safe_name, names), lambda name: f"{PurePosixPath(name).stem}.txt"
            ).items():
                rule = f"{', '.join(owners)} share this annotation file"
                content.report(place / "annotations" / annotation, rule, "Keep one of these pictures")
            prefix = (place / "images").relative_to(self.folder)
            listed.setdefault(split, []).extend((prefix / name).as_posix() for name in names if is_safe_name(name))
            annotations = {path.stem for path in (place / "annotations").glob("*.txt")}
            lonely = sorted(annotations - {PurePosixPath(name).stem for name in names})
            if lonely:
                examples = ", ".join(lonely[:_NUM_EXAMPLES])
                rule = f"{len(lonely)} annotation files have no picture, for example {examples}"
                content.warn(place / "annotations", rule, "Left out when prepared: add the pictures")
        for place in _subfolders(self.folder):
            num_pictures = len(_pictures(place)) if place not in places else 0
            if num_pictures:
                rule = f"{num_pictures} pictures have no annotations beside them"
                self.splits["train"].warn(place, rule, "Left out when prepared: add annotations/")
        return listed


def _pictures(place: Path) -> list[str]:
    folder = place / "images"
    found = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in found if is_picture(name) and not is_hidden(name))


def _subfolders(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not is_hidden(path.name))


def _annotation(picture: str) -> PurePosixPath:
    path = PurePosixPath(picture)
    return path.parent.parent / "annotations" / f"{path.stem}.txt"


def _places(folder: Path) -> list[Path]:
    """Return the folders that hold images/ beside annotations/ with text files: the folder itself, or those in it."""
    return [
        place
        for place in (folder, *_subfolders(folder))
        if (place / "images").is_dir() and any((place / "annotations").glob("*.txt"))
    ]


def _split_of(name: str) -> str:
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    found = {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else UNASSIGNED

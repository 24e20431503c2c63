"""YOLO: a text file for each picture, `class cx cy w h` a row, in shares of the picture as stored.

Class names come from a `data.yaml` (`names`, and `train`, `val`, `test`: folders, or lists of pictures) or, as Darknet
has it, from a `.names` file, a name a line, with `train.txt`, `val.txt` or `valid.txt`, and `test.txt` beside it. Where
neither says which split a picture is in, folders called train, val or valid, and test do. A picture's labels are at
its path with the last `images` replaced by `labels`, or beside it; without a label file it has no objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.cleaning import ImageBoxes, read_pictures
from data.dividing import Divider
from data.label_files import UnreadableFile, number, read_rows, whole
from data.problems import ImportRefused
from data.records import SPLITS, Split
from data.yolo_folder import UnreadableFolder, find_names, read_folder

_FIELDS = ("class", "cx", "cy", "w", "h")
# A box may stick out of its picture, but values beyond are pixels or damage, not shares of a picture.
_MIN_SHARE, _MAX_SHARE = -1.0, 2.0
_NUM_EXAMPLES = 3


def recognise(folder: Path) -> tuple[bool, str]:
    """Whether a folder is in this layout, and what was found or missed."""
    try:
        content = read_folder(folder)
    except UnreadableFolder as error:
        return False, error.problem.rule
    num_labelled = sum(content.label_file(name) is not None for names in content.listed.values() for name in names)
    names = f"{content.source.relative_to(folder).as_posix()} names {len(content.names)} classes"
    return num_labelled > 0, f"{names} and {num_labelled or 'no'} pictures have a label file"


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names in the order of the labels' numbers; ImportRefused when they cannot be told."""
    try:
        return find_names(folder)[1]
    except UnreadableFolder as error:
        raise ImportRefused(str(error.problem)) from error


def read_yolo(folder: Path, classes: Sequence[str], divide: Divider) -> dict[str, Split]:
    """Read the pictures of every split; every fault becomes a `Problem` of its split, nothing is raised.

    Sizes are those of the pictures' headers. A class is found by its name in the card, whatever its number here.
    """
    splits: dict[str, Split] = {split: Split() for split in SPLITS}
    first = splits["train"]
    try:
        content = read_folder(folder)
    except UnreadableFolder as error:
        first.extend([error.problem])
        return splits
    first.extend(content.problems)
    labels = {name: label for label, name in enumerate(classes)}
    without: list[str] = []

    def read_labels(name: str, boxes: ImageBoxes) -> None:
        label_file = content.label_file(name)
        if label_file is None:
            without.append(name)
        else:
            read_label_file(folder / label_file, content.names, labels, boxes)

    divided = divide(content.listed)
    read_pictures(folder, splits, divided, read_labels)
    if without:
        rule = f"{len(without)} pictures have no label file, for example {', '.join(without[:_NUM_EXAMPLES])}"
        first.warn(folder, rule, "Taken as pictures without objects")
    unused = content.unused_labels({name for names in divided.values() for name in names})
    if unused:
        examples = ", ".join(unused[:_NUM_EXAMPLES])
        rule = f"{len(unused)} text files are labels of no picture in a split, for example {examples}"
        first.warn(folder, rule, "Left out when prepared: add or list the pictures to use them")
    return splits


def read_label_file(path: Path, names: Sequence[str], labels: dict[str, int], boxes: ImageBoxes) -> None:
    """Read one file into `boxes`; `names` by the number in the file, `labels` by name."""
    content = boxes.content
    try:
        for row in read_rows(path, "space"):
            if len(row.fields) != len(_FIELDS):
                rule = f"a row has 5 fields (class cx cy w h), found {row.num_fields}"
                content.report(path, rule, "Write boxes, not polygons or detections", line=row.line)
                continue
            key = whole(row.fields[0].text)
            if key is None or not 0 <= key < len(names):
                rule = f"class must be a number from 0 to {len(names) - 1}, found {row.fields[0].text!r}"
                content.report(path, rule, f"Classes: {', '.join(names)}", line=row.line, column=row.fields[0].column)
                continue
            if names[key] not in labels:
                rule = f"{names[key]!r} is not one of the card's classes"
                content.report(path, rule, f"Known: {', '.join(labels)}", line=row.line, column=row.fields[0].column)
                continue
            shares: list[float] = []
            for name, field in zip(_FIELDS[1:], row.fields[1:], strict=True):
                share = number(field.text)
                if share is None or not _MIN_SHARE <= share <= _MAX_SHARE:
                    rule = f"{name} must be a share of the picture, 0 to 1, found {field.text!r}"
                    content.report(
                        path, rule, "Divide pixels by the picture's width or height", line=row.line, column=field.column
                    )
                    break
                shares.append(share)
            if len(shares) == len(_FIELDS) - 1:
                cx, cy, w, h = shares
                wide, high = boxes.width_px, boxes.height_px
                shown = f"box {[field.text for field in row.fields[1:]]} (cx, cy, w, h)"
                box = ((cx - w / 2) * wide, (cy - h / 2) * high, w * wide, h * high)
                boxes.add(path, row.line, shown, labels[names[key]], names[key], box)
    except UnreadableFile as error:
        content.report(path, str(error), "Write the labels again or remove the file")

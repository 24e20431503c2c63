"""UAVDT-DET: pictures of a sequence in a folder of its name, boxes in `<sequence>_gt_whole.txt`.

A row of `_gt_whole.txt` is `frame,id,x,y,w,h,out-of-view,occlusion,category` (1 car, 2 truck, 3 bus), one of
`_gt_ignore.txt`, which a sequence may lack, is `frame,id,x,y,w,h,1,-1,-1`: an ignore region. A frame is the number at
the end of a picture's name. Files `<sequence>_attr.txt` in folders called train and test say which split a
sequence is in.

Facts: the UAVDT toolkit; Du et al. 2018.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.cleaning import ImageBoxes, read_pictures, whole_numbers
from data.dividing import UNASSIGNED, Divider
from data.label_files import is_safe_name
from data.pictures import files_below, is_picture
from data.records import SPLITS, XYWH, Split

CLASSES = ("car", "truck", "bus")
_WHOLE, _IGNORE, _ATTRIBUTES = "_gt_whole.txt", "_gt_ignore.txt", "_attr.txt"
_FIELDS = ("frame", "id", "x", "y", "w", "h", "out-of-view", "occlusion", "category")
_NUM_EXAMPLES = 3


class Target(NamedTuple):
    """One row; `category` is None for an ignore region."""

    path: Path
    line: int
    box_xywh_px: XYWH
    category: int | None


def recognise(folder: Path) -> tuple[bool, str]:
    """Whether a folder is in this layout, and what was found or missed."""
    parts = _Parts(folder)
    if not parts.whole:
        return False, f"no file *{_WHOLE}"
    found = f"{len(parts.whole)} files *{_WHOLE} and pictures of {len(parts.pictures)} of these sequences"
    return bool(parts.pictures), found


def class_names(folder: Path) -> tuple[str, ...]:  # noqa: ARG001
    """Return the benchmark's three classes, in its order."""
    return CLASSES


def read_uavdt(folder: Path, classes: Sequence[str], divide: Divider) -> dict[str, Split]:
    """Read the pictures of all sequences; every fault becomes a `Problem`, nothing is raised.

    Sizes are those of the pictures' headers. Faults of a sequence's files are told with the split of its first picture.
    """
    return _Reader(folder, classes).read(divide)


class _Parts:
    """What belongs to which sequence; names are relative to the folder."""

    def __init__(self, folder: Path) -> None:
        names = [PurePosixPath(name) for name in files_below(folder) if is_safe_name(name)]
        self.whole = {path.name.removesuffix(_WHOLE): path for path in names if path.name.endswith(_WHOLE)}
        self.ignore = {path.name.removesuffix(_IGNORE): path for path in names if path.name.endswith(_IGNORE)}
        self.splits = {
            path.name.removesuffix(_ATTRIBUTES): path.parent.name
            for path in names
            if path.name.endswith(_ATTRIBUTES) and path.parent.name in SPLITS
        }
        # By sequence: frame -> picture.
        self.pictures: dict[str, dict[int, str]] = {}
        self.unused: list[str] = []
        for path in names:
            if not is_picture(path.name):
                continue
            digits = re.search(r"(\d{1,9})$", path.stem)
            frames = self.pictures.setdefault(path.parent.name, {}) if path.parent.name in self.whole else None
            if frames is None or digits is None or int(digits[1]) in frames:
                self.unused.append(path.as_posix())
            else:
                frames[int(digits[1])] = path.as_posix()

    def listed(self) -> dict[str, list[str]]:
        """Return the pictures by split, UNASSIGNED where no attribute file says which."""
        listed: dict[str, list[str]] = defaultdict(list)
        for sequence, frames in sorted(self.pictures.items()):
            listed[self.splits.get(sequence, UNASSIGNED)] += frames.values()
        return dict(listed)


class _Reader:
    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self.labels = {name: label for label, name in enumerate(classes)}
        self.parts = _Parts(folder)
        self.sequence_of = {name: key for key, frames in self.parts.pictures.items() for name in frames.values()}
        self.frame_of = {name: frame for frames in self.parts.pictures.values() for frame, name in frames.items()}
        self._sequence: str | None = None
        self._targets: dict[int, list[Target]] = {}

    def read(self, divide: Divider) -> dict[str, Split]:
        splits: dict[str, Split] = {split: Split() for split in SPLITS}
        first, parts = splits["train"], self.parts
        if not parts.pictures:
            first.report(self.folder, f"there is no file *{_WHOLE} with a folder of pictures of its name", "Add them")
        for what, names in (
            ("sequences have no pictures", sorted(set(parts.whole) - set(parts.pictures))),
            ("files of ignore regions have no sequence", sorted(set(parts.ignore) - set(parts.whole))),
            ("pictures are of no sequence or repeat a frame", parts.unused),
        ):
            if names:
                rule = f"{len(names)} {what}, for example {', '.join(names[:_NUM_EXAMPLES])}"
                first.warn(self.folder, rule, "Left out when prepared: add what is missing")
        read_pictures(self.folder, splits, divide(parts.listed()), self._label)
        return splits

    def _label(self, name: str, boxes: ImageBoxes) -> None:
        # Pictures come sequence by sequence: one at a time is in memory.
        if self.sequence_of[name] != self._sequence:
            self._sequence = self.sequence_of[name]
            self._targets = self._read_sequence(self._sequence, boxes.content)
        for path, line, box, category in self._targets.get(self.frame_of[name], ()):
            shown = f"box {[int(side) for side in box]} (x, y, w, h)"
            if category is None:
                boxes.ignore(path, line, shown, box)
            else:
                class_name = CLASSES[category - 1]
                boxes.add(path, line, shown, self.labels[class_name], class_name, box)

    def _read_sequence(self, sequence: str, content: Split) -> dict[int, list[Target]]:
        targets: dict[int, list[Target]] = defaultdict(list)
        for parts, is_ignore in ((self.parts.whole, False), (self.parts.ignore, True)):
            path = self.folder / parts[sequence] if sequence in parts else None
            if path is None:
                continue
            for row, (frame, _, x, y, w, h, _, _, category) in whole_numbers(path, _FIELDS, content):
                if is_ignore or (1 <= category <= len(CLASSES) and CLASSES[category - 1] in self.labels):
                    box = (float(x), float(y), float(w), float(h))
                    targets[frame].append(Target(path, row.line, box, None if is_ignore else category))
                else:
                    rule = f"category {category} is none of the card's classes; 1 is car, 2 truck, 3 bus"
                    remedy = f"Known: {', '.join(self.classes)}"
                    content.report(path, rule, remedy, line=row.line, column=row.fields[-1].column)
        lacking = sorted(targets.keys() - self.parts.pictures[sequence].keys())
        if lacking:
            frames = ", ".join(str(frame) for frame in lacking[:_NUM_EXAMPLES])
            rule = f"{len(lacking)} frames of {sequence} have boxes and no picture, for example {frames}"
            content.warn(self.folder / self.parts.whole[sequence], rule, "Left out when prepared: add the pictures")
        return targets

"""Boxes of one picture made clean: clipped to it, free of repetitions, everything left out counted and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from data.label_files import Row, UnreadableFile, read_rows, whole
from data.pictures import sizes
from data.records import SPLITS, XYWH, Box, ImageRecord, Split, clip_xywh


class ImageBoxes:
    """Collects the boxes and ignore regions of one picture; what is wrong with them goes into its split's `content`."""

    def __init__(self, content: Split, width_px: int, height_px: int) -> None:
        self.content = content
        self.width_px, self.height_px = width_px, height_px
        self._boxes: dict[tuple[int, XYWH], Box] = {}
        self._ignored: list[XYWH] = []

    def add(
        self, path: Path, line: int, shown: str, label: int, name: str, box_xywh_px: XYWH, *, is_crowd: bool = False
    ) -> None:
        """Take in one box; `shown` is it in the file's own terms. Repetitions of a class's box are left out."""
        clipped = self._clip(path, line, shown, box_xywh_px)
        if clipped is None:
            return
        if (label, clipped) in self._boxes:
            self.content.num_boxes_excluded += 1
            rule = f"{shown} of class {name!r} occurs twice"
            self.content.warn(path, rule, "Kept once when prepared: delete the repetition", line=line)
            return
        if clipped != tuple(round(side, 2) for side in box_xywh_px):
            self.content.num_boxes_clipped += 1
            rule = f"{shown} sticks out of its {self.width_px}x{self.height_px} px image"
            self.content.warn(path, rule, "Clipped when prepared", line=line)
        self._boxes[label, clipped] = Box(label, clipped, round(clipped[2] * clipped[3], 2), is_crowd)

    def ignore(self, path: Path, line: int, shown: str, box_xywh_px: XYWH) -> None:
        """Take in one ignore region, clipped to the picture."""
        clipped = self._clip(path, line, shown, box_xywh_px)
        if clipped is not None:
            self._ignored.append(clipped)

    def record(self, image_id: int, file_name: str) -> ImageRecord:
        """Return the picture's record; boxes and regions are in the order in which they came."""
        boxes, ignored = tuple(self._boxes.values()), tuple(self._ignored)
        return ImageRecord(image_id, file_name, self.width_px, self.height_px, boxes, ignored)

    def _clip(self, path: Path, line: int, shown: str, box_xywh_px: XYWH) -> XYWH | None:
        clipped = clip_xywh(box_xywh_px, self.width_px, self.height_px)
        if clipped is None:
            self.content.num_boxes_excluded += 1
            rule = f"{shown} has no area inside its {self.width_px}x{self.height_px} px image"
            self.content.warn(path, rule, "Left out when prepared: mend or delete it", line=line)
        return clipped


def read_pictures(
    images: Path,
    splits: Mapping[str, Split],
    divided: Mapping[str, Sequence[str]],
    read_labels: Callable[[str, ImageBoxes], None],
) -> None:
    """Add a record for every picture of `divided` (names by split), sized by its header, with what `read_labels` finds.

    Labels are read in the order of the names over all splits, so that what lies together is read together. Image ids
    run from 1 through all splits.
    """
    split_of = {name: split for split in SPLITS for name in divided[split]}
    names = sorted(split_of)
    for name, size in zip(names, sizes(images, names), strict=True):
        content = splits[split_of[name]]
        if isinstance(size, UnreadableFile):
            content.report(images / name, str(size), "Replace the file, or remove it and its labels")
            continue
        boxes = ImageBoxes(content, *size)
        read_labels(name, boxes)
        content.images.append(boxes.record(0, name))
    ids = count(1)
    for split in SPLITS:
        splits[split].images = [image._replace(image_id=next(ids)) for image in splits[split].images]


def whole_numbers(path: Path, names: Sequence[str], content: Split) -> Iterator[tuple[Row, list[int]]]:
    """Yield every row of a table of whole numbers between commas, a column for each name; faults go into `content`."""
    try:
        for row in read_rows(path, "comma"):
            values = [whole(field.text) for field in row.fields]
            if len(values) != len(names):
                rule = f"a row has {len(names)} fields ({','.join(names)}), found {row.num_fields}"
                content.report(path, rule, "Correct it", line=row.line)
            elif None in values:
                wrong = values.index(None)
                rule = f"{names[wrong]} must be a whole number, found {row.fields[wrong].text!r}"
                content.report(path, rule, "Correct it", line=row.line, column=row.fields[wrong].column)
            else:
                yield row, [value for value in values if value is not None]
    except UnreadableFile as error:
        content.report(path, str(error), "Provide a sound annotation file")

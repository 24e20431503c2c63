"""What every raw format is read into: images with their boxes, as clean as the prepared dataset.

Boxes are `xywh` in pixels of the image as stored (an EXIF rotation is not applied).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from data.problems import Problem

SPLITS: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")

# Of one file; each takes about half a kilobyte, and nobody reads more.
_MAX_PROBLEMS = 20_000

XYWH = tuple[float, float, float, float]


class Box(NamedTuple):
    """One annotation: `label` is 0-based in card order; a crowd box is COCO's `iscrowd` 1."""

    label: int
    box_xywh_px: XYWH
    area_px: float
    is_crowd: bool = False


class ImageRecord(NamedTuple):
    """One image and everything known about it; `file_name` is relative to `images/`."""

    image_id: int
    file_name: str
    width_px: int
    height_px: int
    boxes: tuple[Box, ...]
    ignore_xywh_px: tuple[XYWH, ...]


@dataclass
class Split:
    """What one annotation file holds after cleaning, and what cleaning found.

    `num_boxes_excluded` had no area inside their image or repeated another; `num_boxes_clipped` stuck out of it.
    `num_images_excluded` were drawn for this split but nearly repeat a picture of another.
    """

    images: list[ImageRecord] = field(default_factory=list)
    num_boxes_clipped: int = 0
    num_boxes_excluded: int = 0
    num_images_excluded: int = 0
    _problems: list[Problem] = field(default_factory=list, repr=False)
    _num_problems: dict[Path, int] = field(default_factory=dict, repr=False)

    @property
    def problems(self) -> list[Problem]:
        """All problems; of a file with more than anybody reads the first ones, and at the end how many more."""
        return self._problems + [
            Problem(
                path, None, f"{number - _MAX_PROBLEMS} more problems of this file are not listed", "Correct the others"
            )
            for path, number in self._num_problems.items()
            if number > _MAX_PROBLEMS
        ]

    def report(self, path: Path, rule: str, remedy: str, *, line: int | None = None, column: int | None = None) -> None:
        """Add an error, which stops preparation."""
        if self._has_room(path):
            self._problems.append(Problem(path, line, rule, remedy, "error", column))

    def warn(self, path: Path, rule: str, remedy: str, *, line: int | None = None) -> None:
        """Add a warning: something that is mended or left out when prepared."""
        if self._has_room(path):
            self._problems.append(Problem(path, line, rule, remedy, "warning"))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Add what was found elsewhere."""
        self._problems += problems

    def _has_room(self, path: Path) -> bool:
        number = self._num_problems[path] = self._num_problems.get(path, 0) + 1
        return number <= _MAX_PROBLEMS


def clip_xywh(box_xywh_px: Iterable[float], width_px: int, height_px: int) -> XYWH | None:
    """Return the box clipped to the image and rounded to 2 decimals, or None when no area is left."""
    x, y, w, h = box_xywh_px
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + w, float(width_px)), min(y + h, float(height_px))
    clipped = (round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2))
    return clipped if w > 0 and h > 0 and clipped[2] > 0 and clipped[3] > 0 else None

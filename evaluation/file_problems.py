"""What is wrong with files of ground truth and detections: all of it, with file and line, before anything is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from reprlib import repr
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.label_files import MAX_LIST_BYTES, UnreadableFile, number, read_lines
from evaluation.checks import MAX_LISTED, MAX_NUMBER, listed
from evaluation.tables import Tables


class BadFiles(ValueError):
    """Files that cannot be scored; lists every problem, the first 20 in full."""


class Problems:
    """Collects problems: the first ones in full, and the number of all."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._number = 0

    def add(self, place: str | Path, rule: str) -> None:
        """Add one; `rule` says what was found, what is allowed and what to do."""
        self._number += 1
        if self._number <= MAX_LISTED:
            # File names may hold bytes that are no text.
            self._shown.append(f"{place}: {rule}".encode(errors="backslashreplace").decode())

    def check(self) -> None:
        """Raise BadFiles if there is any."""
        if self._number:
            raise BadFiles(listed(self._shown, self._number))


class FileTables(NamedTuple):
    """What files say, and where: the place of a row of its ground truths, or of its detections, by file and line.

    `notes`: what one must know of these files beside that.
    """

    tables: Tables
    truth_place: Callable[[int], str]
    detection_place: Callable[[int], str]
    notes: tuple[str, ...] = ()


class NumberTable(NamedTuple):
    """Rows of a text file of numbers: `lines` (N,), from 1, and `values` (N, F)."""

    path: Path
    lines: NDArray[np.int64]
    values: NDArray[np.float64]

    def require(self, is_sound: NDArray[np.bool_], rule: Callable[[list[float]], str], problems: Problems) -> None:
        """Of each row that is not sound, bool (N,), say to `problems` what `rule` makes of its values."""
        for row in np.flatnonzero(~is_sound).tolist():
            problems.add(f"{self.path}:{self.lines[row]}", rule(self.values[row].tolist()))


def place_of(row: int, tables: Sequence[NumberTable]) -> str:
    """Return file and line of a row, counted from 0 through all tables."""
    for table in tables:
        if row < len(table.lines):
            return f"{table.path}:{table.lines[row]}"
        row -= len(table.lines)
    raise IndexError(f"the tables end {row + 1} rows before this one")


def read_numbers(path: Path, fields: Sequence[str], problems: Problems) -> NumberTable:
    """Read rows with a number for each of `fields`, between commas; others are problems. An empty file has no rows."""
    lines, rows = [], []
    try:
        for line, text in read_lines(path, MAX_LIST_BYTES):
            # Some rows of VisDrone end in a comma.
            texts = text.strip().removesuffix(",").split(",")
            values = [number(field.strip()) for field in texts]
            sound = [value for value in values if value is not None and abs(value) <= MAX_NUMBER]
            if len(values) != len(fields):
                rule = f"a row has {len(fields)} columns ({','.join(fields)}), found {len(values)}"
                problems.add(f"{path}:{line}", rule)
            elif len(sound) != len(fields):
                wrong = next(i for i, value in enumerate(values) if value is None or abs(value) > MAX_NUMBER)
                rule = f"{fields[wrong]} in column {wrong + 1} must be a finite number up to {MAX_NUMBER:.0e} in size"
                problems.add(f"{path}:{line}", f"{rule}, found {repr(texts[wrong])}")
            else:
                lines.append(line)
                rows.append(sound)
    except UnreadableFile as error:
        problems.add(path, str(error))
    return NumberTable(path, np.array(lines, np.int64), np.array(rows, np.float64).reshape(-1, len(fields)))

"""Label files read with suspicion: bytes, rows of text with line and column, numbers, names of other files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Literal, NamedTuple

# A picture of 20,000 boxes stays below it, and a sequence of video; a longer file is a mistake, or meant to take hours.
MAX_LABEL_BYTES = 2 * 2**20
# A list names each picture in about 60 bytes: four million pictures.
MAX_LIST_BYTES = 256 * 2**20
# No format here has more than 9 fields.
MAX_FIELDS = 64
# Integers of this size are exact in floating point.
_MAX_WHOLE = 2.0**53
# What folders and lists call the splits.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# The backslash, control characters, and the halves of characters that stand for bytes that are no text.
_UNWRITABLE = re.compile("[\\\\\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


class UnreadableFile(ValueError):
    """A file that cannot be read as what it should be; the message is the rule it breaks."""


class Field(NamedTuple):
    """One field of a row; `column` counts characters from 1."""

    column: int
    text: str


class Row(NamedTuple):
    """One line that is not blank; `line` counts from 1; of a long row only the first MAX_FIELDS + 1 fields are kept."""

    line: int
    fields: list[Field]

    @property
    def num_fields(self) -> str:
        """How many fields there are, for people."""
        return str(len(self.fields)) if len(self.fields) <= MAX_FIELDS else f"more than {MAX_FIELDS}"


def read_bytes(path: Path, max_bytes: int | None = MAX_LABEL_BYTES) -> bytes:
    """Read a whole file; UnreadableFile when it is missing, not a regular file, unreadable or above `max_bytes`."""
    try:
        if path.exists() and not path.is_file():
            raise UnreadableFile("not a regular file")
        size_bytes = path.stat().st_size
        if max_bytes is not None and size_bytes > max_bytes:
            raise UnreadableFile(f"{size_bytes} bytes are more than the {max_bytes} that such a file may have")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableFile("the file is missing") from error
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror}") from error


def read_lines(path: Path, max_bytes: int = MAX_LABEL_BYTES) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of every line that is not blank.

    Raises UnreadableFile as `read_bytes` does, and when the file is not UTF-8 text.
    """
    try:
        text = read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"not a text file in UTF-8: {error}") from error
    lines = enumerate(StringIO(text, newline=None), start=1)
    return ((number, line.rstrip("\n")) for number, line in lines if line.strip())


def read_rows(path: Path, separator: Literal["comma", "space"]) -> Iterator[Row]:
    """Yield the rows of a table, see `read_lines`; fields are stripped of blanks, and an empty last one is left out."""
    for number, line in read_lines(path):
        fields = _between_commas(line) if separator == "comma" else _between_blanks(line)
        yield Row(number, fields if fields[-1].text else fields[:-1])


def _between_commas(line: str) -> list[Field]:
    fields, start = [], 1
    for text in line.split(",", MAX_FIELDS):
        fields.append(Field(start + len(text) - len(text.lstrip()), text.strip()))
        start += len(text) + 1
    return fields


def _between_blanks(line: str) -> list[Field]:
    found = islice(re.finditer(r"\S+", line), MAX_FIELDS + 1)
    return [Field(match.start() + 1, match[0]) for match in found]


def number(text: str | None) -> float | None:
    """Return a finite decimal number, or None for anything else."""
    if not text or not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def whole(text: str | None) -> int | None:
    """Return a whole number below 2**53 in size, also where it is written `3.0`, or None for anything else."""
    value = number(text)
    return int(value) if value is not None and value.is_integer() and abs(value) < _MAX_WHOLE else None


def shared(pictures: Iterable[str], label_file: Callable[[str], str | None]) -> dict[str, list[str]]:
    """Return label file -> its pictures, of those label files that are of several."""
    owners: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        name = label_file(picture)
        if name is not None:
            owners[name].append(picture)
    return {name: found for name, found in owners.items() if len(found) > 1}


def is_safe_name(file_name: str) -> bool:
    """Whether a file name stays below the folder it is relative to, and can be written as text."""
    parts = file_name.split("/")
    is_below = bool(file_name.strip("./")) and not file_name.startswith("/") and ".." not in parts
    return is_below and _UNWRITABLE.search(file_name) is None

"""Checks of image files against their records."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.decode import UndecodableImage, read_bgr
from data.headers import Header, oddities, read_header
from data.label_files import UnreadableFile
from data.problems import Problem
from data.records import ImageRecord

INSTEAD_OF_A_LINK = "Put the file in its place; `speck data import --copy` does"


def image_problems(images: Path, records: Sequence[ImageRecord], *, is_foreign: bool = True) -> list[Problem]:
    """Decode the file of every record, several at a time; return the problems in the records' order.

    Links out of a folder that `is_foreign` are problems, not followed.
    """
    root = Path(os.path.realpath(images)) if is_foreign else None
    with warnings.catch_warnings(), threads() as pool:
        # What matters of it becomes a problem.
        warnings.filterwarnings("ignore", module="PIL")
        found = pool.map(lambda record: _problems(root, images / record.file_name, record), records)
        return [problem for problems in found for problem in problems]


def threads() -> ThreadPoolExecutor:
    """Return a pool with a thread per usable core; OpenCV releases the interpreter lock while it works."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def leads_out(path: Path, root: Path) -> bool:
    """Whether a file is a link to something outside `root`, a path without links; nothing is opened."""
    return os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root)


def _problems(root: Path | None, path: Path, record: ImageRecord) -> list[Problem]:
    """Return what is wrong with one file. The header is read first, so that a decompression bomb is never decoded."""
    if root is not None and leads_out(path, root):
        rule = "a link that leads out of the folder of images is not followed"
        return [Problem(path, None, rule, INSTEAD_OF_A_LINK)]
    try:
        header = read_header(path)
    except FileNotFoundError:
        return [Problem(path, None, "the image is missing", "Add the file or remove its record")]
    except UnreadableFile as error:
        return [Problem(path, None, str(error), "Replace the file")]
    found = [Problem(path, None, *oddity, severity="warning") for oddity in oddities(header, path.name).values()]
    fault = _size_error(path, header, record) or _decoding_error(path, header)
    return found if fault is None else [fault, *found]


def _size_error(path: Path, header: Header, record: ImageRecord) -> Problem | None:
    width, height = header.width_px, header.height_px
    if (width, height) == (record.width_px, record.height_px):
        return None
    rule = f"the image is {width}x{height} px, its record says {record.width_px}x{record.height_px}"
    if header.orientation > 4 and (height, width) == (record.width_px, record.height_px):
        remedy = f"Turn the pixels by EXIF orientation {header.orientation}: the record has the frame that viewers show"
        return Problem(path, None, rule, remedy)
    return Problem(path, None, rule, "Correct the record; its boxes may be in the wrong frame")


def _decoding_error(path: Path, header: Header) -> Problem | None:
    try:
        height, width = read_bgr(path).shape[:2]
    except UndecodableImage:
        cause = "32 bits a channel" if header.mode in ("I", "F") else "truncated or damaged"
        return Problem(path, None, f"the image cannot be decoded ({cause})", "Replace the file")
    except OSError as error:
        return Problem(path, None, f"the image cannot be read: {error}", "Replace the file")
    if (width, height) != (header.width_px, header.height_px):
        rule = f"the image is decoded to {width}x{height} px, its header says {header.width_px}x{header.height_px}"
        return Problem(path, None, rule, "Save it again without orientation tags")
    return None

"""Checks of image files against their records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data.decode import UndecodableImage, read_bgr
from data.problems import Problem
from data.records import ImageRecord

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")


def image_problems(images: Path, records: Sequence[ImageRecord]) -> list[Problem]:
    """Decode the file of every record, several at a time; return the problems in the records' order."""
    with threads() as pool:
        found = pool.map(lambda record: _problem(images / record.file_name, record), records)
        return [problem for problem in found if problem is not None]


def threads() -> ThreadPoolExecutor:
    """Return a pool with a thread per usable core; OpenCV releases the interpreter lock while it works."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def _problem(path: Path, record: ImageRecord) -> Problem | None:
    """Return what is wrong with one file. The header is read first, so that a decompression bomb is never decoded."""
    try:
        with Image.open(path, formats=FORMATS) as header:
            width, height = header.size
        if (width, height) != (record.width_px, record.height_px):
            rule = f"the image is {width}x{height} px, its record says {record.width_px}x{record.height_px}"
            return Problem(path, None, rule, "Correct the record; its boxes may be in the wrong frame")
        read_bgr(path)
    except FileNotFoundError:
        return Problem(path, None, "the image is missing", "Add the file or remove its record")
    except UnidentifiedImageError:
        return Problem(path, None, f"not an image of type {', '.join(FORMATS)}", "Convert or replace the file")
    except UndecodableImage:
        return Problem(path, None, "the image cannot be decoded (truncated or damaged)", "Replace the file")
    except (Image.DecompressionBombError, OSError, ValueError) as error:
        return Problem(path, None, f"the image cannot be read: {error}", "Replace the file")
    return None

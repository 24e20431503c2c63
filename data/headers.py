"""What the header of a picture says, read without decoding it, and what about it is odd."""

from __future__ import annotations

import stat
import struct
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from data.label_files import UnreadableFile

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
# The first is the one that a file gets whose suffix is wrong.
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
}  # fmt: skip
# 13,377 px square, 537 MB when decoded: more than aerial cameras have, less than fills a machine.
MAX_PIXELS = 2 * 89_478_485
# Twice what a picture of that size takes without compression; decoders fail at 2 GiB.
MAX_BYTES = 2**30
# Of decoded to stored: deflate makes 1,032 bytes of one, and a grey byte becomes three. SMALL_BYTES harm nobody.
MAX_RATIO = 4000
SMALL_BYTES = 48 * 2**20
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_EXIF_PREFIX = b"Exif\0\0"


class Header(NamedTuple):
    """One picture: its size as stored, its type among FORMATS, and traits that readers treat differently.

    `orientation` is that of EXIF: 1 is upright, from 5 on viewers swap width and height. A TIFF is always 1: its tag
    is part of the type, so decoders turn the pixels, and the size is that after turning. `exif` is the block's bytes.
    """

    width_px: int
    height_px: int
    format: str
    mode: str
    is_deep: bool
    has_alpha: bool
    is_animated: bool
    orientation: int
    exif: bytes


class Oddity(NamedTuple):
    """Something that other tools read otherwise than this one; `rule` and `remedy` are those of a `Problem`."""

    rule: str
    remedy: str


def read_header(path: Path) -> Header:
    """Read the header of a picture.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: it is not a regular file, is empty, of no type among FORMATS, damaged, or has more than
            MAX_PIXELS pixels or MAX_BYTES, or more pixels than its bytes can hold.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableFile(f"the image cannot be read: {error}") from error
    # Opening a pipe waits for somebody to write into it.
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile("not a regular file")
    if status.st_size == 0:
        raise UnreadableFile("the file is empty (0 bytes)")
    if status.st_size > MAX_BYTES:
        raise UnreadableFile(f"the file has {status.st_size} bytes, more than {MAX_BYTES}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            header = _header(image)
    except UnidentifiedImageError as error:
        raise UnreadableFile(f"not an image of type {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableFile(_too_large(str(error).partition(" exceeds")[0])) from error
    # Damaged files make its readers raise nearly anything.
    except Exception as error:
        raise UnreadableFile(f"the image cannot be read: {error}") from error
    if header.width_px * header.height_px > MAX_PIXELS:
        raise UnreadableFile(_too_large(f"{header.width_px}x{header.height_px} px"))
    if header.format == "PNG":
        _check_chunks(path, status.st_size)
    decoded_bytes = 3 * header.width_px * header.height_px
    if decoded_bytes > max(SMALL_BYTES, MAX_RATIO * status.st_size):
        size = f"{header.width_px}x{header.height_px} px in {status.st_size} bytes"
        raise UnreadableFile(f"{size}: the file is cut off, its header is damaged, or it is a decompression bomb")
    return header


def _check_chunks(path: Path, size_bytes: int) -> None:
    """Raise UnreadableFile at a chunk of a PNG that is far longer than the file: OpenCV would make room for it."""
    with path.open("rb") as file:
        place = file.seek(8)
        while len(start := file.read(8)) == 8:
            length = int.from_bytes(start[:4])
            if length > max(SMALL_BYTES, size_bytes - place):
                raise UnreadableFile(f"a chunk says it has {length} bytes, in a file of {size_bytes}: it is damaged")
            place = file.seek(place + 12 + length)


def oddities(header: Header, name: str) -> dict[str, Oddity]:
    """Return what is odd about a picture of this file name, by kind."""
    found: dict[str, Oddity] = {}
    suffix = PurePosixPath(name).suffix
    if suffix.lower() not in SUFFIXES[header.format]:
        rule = f"the suffix {suffix!r} is wrong: the file is of type {header.format}"
        found["suffix"] = Oddity(rule, "Rename it; --fix does, but for YOLO")
    if header.orientation != 1:
        rule = f"EXIF orientation {header.orientation}: viewers turn the picture, here it is read as stored"
        found["orientation"] = Oddity(rule, "See that its boxes are in the stored frame; --fix drops the tag")
    if header.is_deep:
        rule = "more than 8 bits a channel: only the highest 8 are read, so 16-bit values below 256 are black"
        found["16 bits"] = Oddity(rule, "Scale faint pictures yourself; --fix keeps the highest 8")
    if header.has_alpha:
        found["alpha"] = Oddity("transparency is not read: what it hides is seen", "Flatten it; --fix drops it")
    if header.mode == "CMYK":
        found["CMYK"] = Oddity("colours are CMYK, which is turned into RGB without a profile", "Save it as RGB")
    if header.is_animated:
        found["several frames"] = Oddity(
            "the file has several frames: only the first is read", "Save frames one by one"
        )
    return found


def orientation_at(exif: bytes) -> tuple[int, str] | None:
    """Return where in an EXIF block the orientation's two bytes lie, and their order as `struct` has it; or None.

    Facts: the TIFF 6.0 specification, section 2: a header of 8 bytes, then a directory of entries of 12 bytes.
    """
    start = len(_EXIF_PREFIX) if exif.startswith(_EXIF_PREFIX) else 0
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[start : start + 4])
    if order is None or len(exif) < start + 8:
        return None
    entries = start + struct.unpack_from(f"{order}I", exif, start + 4)[0] + 2
    if entries > len(exif):
        return None
    for entry in range(entries, entries + 12 * struct.unpack_from(f"{order}H", exif, entries - 2)[0], 12):
        if entry + 12 > len(exif):
            return None
        if struct.unpack_from(f"{order}HHI", exif, entry) == (_ORIENTATION_TAG, _SHORT, 1):
            return entry + 8, order
    return None


def _header(image: Image.Image) -> Header:
    exif = image.info.get("exif", b"")
    place = orientation_at(exif)
    orientation = struct.unpack_from(f"{place[1]}H", exif, place[0])[0] if place else 1
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else None
    raw_mode = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    is_deep = image.format in ("PNG", "TIFF") and (image.mode in ("I", "F") or ";16" in raw_mode)
    # Cameras add a preview as a second frame to a JPEG, which is of type MPO then.
    is_jpeg = image.format in ("JPEG", "MPO")
    return Header(
        *image.size,
        format="JPEG" if is_jpeg else str(image.format),
        mode=image.mode,
        is_deep=is_deep,
        has_alpha=image.has_transparency_data,
        is_animated=not is_jpeg and bool(getattr(image, "is_animated", False)),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        exif=exif,
    )


def _too_large(found: str) -> str:
    return f"{found}: an image may have {MAX_PIXELS} pixels at most, for more could be a decompression bomb"

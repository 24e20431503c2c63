"""Pictures that are odd, broken or meant to hurt, and what `check` says of each."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.checking import check
from data.decode import read_bgr
from data.headers import MAX_PIXELS, orientation_at, read_header
from data.images import image_problems
from data.label_files import UnreadableFile
from data.problems import Problem
from data.records import ImageRecord

Make = Callable[..., Path]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), np.uint8)
DEEP = RNG.integers(0, 2**16, (40, 60, 3), np.uint16)
CLEAR = RNG.integers(0, 256, (40, 60, 4), np.uint8)
FRAMES = [Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(3)]


def turned(path: Path, orientation: int, tag: int = 0x0112) -> None:
    exif = Image.Exif()
    exif[tag] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif)


def save_frames(path: Path, format: str | None = None) -> None:
    FRAMES[0].save(path, format, save_all=True, append_images=FRAMES[1:])


def problems(path: Path, width_px: int = 60, height_px: int = 40) -> list[Problem]:
    return image_problems(path.parent, [ImageRecord(1, path.name, width_px, height_px, (), ())])


ODD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "png called jpg": ("a.jpg", lambda path: Image.fromarray(PIXELS).save(path, "PNG"), "the suffix '.jpg' is wrong"),
    "no suffix": ("a", lambda path: Image.fromarray(PIXELS).save(path, "BMP"), "the suffix '' is wrong: the file is"),
    "turned jpeg": ("a.jpg", lambda path: turned(path, 6), "EXIF orientation 6: viewers turn the picture"),
    "mirrored png": ("a.png", lambda path: turned(path, 2), "EXIF orientation 2"),
    "turned webp": ("a.webp", lambda path: turned(path, 8), "EXIF orientation 8"),
    "16-bit png": ("a.png", lambda path: cv2.imwrite(str(path), DEEP), "more than 8 bits a channel"),
    "16-bit grey png": ("a.png", lambda path: cv2.imwrite(str(path), DEEP[..., 0]), "more than 8 bits a channel"),
    "16-bit tiff": ("a.tiff", lambda path: cv2.imwrite(str(path), DEEP), "more than 8 bits a channel"),
    "transparent png": ("a.png", lambda path: cv2.imwrite(str(path), CLEAR), "transparency is not read"),
    "transparent webp": ("a.webp", lambda path: cv2.imwrite(str(path), CLEAR), "transparency is not read"),
    "clear colour": (
        "a.png",
        lambda path: Image.fromarray(PIXELS).convert("P").save(path, transparency=3),
        "transparency is not read",
    ),
    "cmyk": ("a.jpg", lambda path: Image.fromarray(PIXELS).convert("CMYK").save(path), "colours are CMYK"),
    "animated": ("a.png", save_frames, "the file has several frames"),
    "pages": ("a.tif", save_frames, "the file has several frames"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_are_warnings(tmp_path: Path, kind: str) -> None:
    name, write, rule = ODD[kind]
    write(tmp_path / name)
    (problem,) = problems(tmp_path / name)
    assert (problem.severity, problem.path) == ("warning", tmp_path / name)
    assert problem.rule.startswith(rule)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".bmp", ".tif", ".webp"])
def test_plain_pictures_are_no_problem(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(PIXELS).save(path)
    assert problems(path) == []


def test_a_preview_beside_a_photo_is_no_second_frame(tmp_path: Path) -> None:
    """Drone cameras write such files."""
    path = tmp_path / "a.jpg"
    save_frames(path, "MPO")
    assert read_header(path).format == "JPEG"
    assert problems(path) == []


def test_labels_in_the_viewers_frame_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    turned(path, 6)
    error, warning = problems(path, width_px=40, height_px=60)
    assert (error.severity, warning.severity) == ("error", "warning")
    assert error.rule == "the image is 60x40 px, its record says 40x60"
    assert error.remedy == "Turn the pixels by EXIF orientation 6: the record has the frame that viewers show"
    assert "wrong frame" in problems(path, width_px=41, height_px=60)[0].remedy


def test_a_tiff_is_turned_by_header_and_decoder_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    turned(path, 6)
    header = read_header(path)
    assert (header.width_px, header.height_px, header.orientation) == (40, 60, 1)
    assert problems(path, 40, 60) == []
    np.testing.assert_array_equal(read_bgr(path)[..., ::-1], np.rot90(PIXELS, -1))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 0.99])
def test_truncated_pictures_are_errors(tmp_path: Path, suffix: str, share: float) -> None:
    content = cv2.imencode(suffix, PIXELS)[1].tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    (problem,) = problems(path)
    assert problem.severity == "error"
    assert ("empty (0 bytes)" in problem.rule) == (share == 0)


def test_floating_point_pictures_say_why(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    cv2.imwrite(str(path), PIXELS[..., 0].astype(np.float32))
    error, _ = problems(path)
    assert error.rule == "the image cannot be decoded (32 bits a channel)"


def header_only_png(width_px: int, height_px: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    """The first is just within the limit of pixels, but a header is no room for them."""
    path = tmp_path / "a.png"
    height = MAX_PIXELS // 10_000
    path.write_bytes(header_only_png(10_000, height))
    assert f"10000x{height} px in 45 bytes: the file is cut off" in problems(path, 10_000, height)[0].rule
    for size in ((10_000, height + 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        path.write_bytes(header_only_png(*size))
        (problem,) = problems(path, *size)
        assert f"an image may have {MAX_PIXELS} pixels at most" in problem.rule


def test_what_is_no_file_is_neither_opened_nor_followed(coco_folder: Make, make_repo: Make, tmp_path: Path) -> None:
    source = coco_folder()
    outside = tmp_path / "outside.png"
    shutil.copyfile(source / "images/train/a.png", outside)
    train, val, test = (source / "images" / split for split in ("train", "val", "test"))
    for path in (*train.iterdir(), *val.iterdir(), test / "a.png"):
        path.unlink()
    os.mkfifo(train / "a.png")
    (train / "b.png").symlink_to(outside)
    (val / "a.png").mkdir()
    (val / "b.png").symlink_to("/dev/zero")
    (test / "a.png").symlink_to("b.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(train)
        try:
            listener.bind("c.png")
        finally:
            os.chdir(here)
        assert problems(train / "c.png")[0].rule == "not a regular file"
    repo = make_repo(source)
    errors = [problem for problem in check("tiny", repo) if problem.severity == "error"]
    found = {str(problem.path.relative_to(repo / "data/raw/tiny/images")): problem.rule for problem in errors}
    link = "a link that leads out of the folder of images is not followed"
    assert found == {
        "train/a.png": "not a regular file",
        "train/b.png": link,
        "val/a.png": "not a regular file",
        "val/b.png": link,
    }


def test_missing_and_dangling_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("gone.png")
    assert problems(tmp_path / "a.png")[0].rule == "the image is missing"
    assert problems(tmp_path / "b.png")[0].rule == "the image is missing"


@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08"]))
def test_any_exif_block_is_survived(tail: bytes, start: bytes) -> None:
    place = orientation_at(start + tail)
    assert place is None or place[0] + 2 <= len(start + tail)


def test_exif_blocks_of_damaged_files_are_survived(tmp_path: Path) -> None:
    turned(tmp_path / "a.jpg", 3)
    content = (tmp_path / "a.jpg").read_bytes()
    for place in range(len(content) // 2):
        path = tmp_path / "b.jpg"
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            header = read_header(path)
        except UnreadableFile:
            continue
        assert 1 <= header.orientation <= 8


def test_more_pixels_than_the_bytes_can_hold_are_not_decoded(tmp_path: Path) -> None:
    """A header of 12,000 x 12,000 px in front of 4 kB: a decoder would take 432 MB before it found the end."""
    path = tmp_path / "cut.png"
    grey = Image.new("L", (12_000, 12_000))
    grey.save(path)
    assert read_header(path).width_px == 12_000, "one colour all over is no bomb"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(
        UnreadableFile, match="12000x12000 px in 4000 bytes: the file is cut off, its header is damaged"
    ):
        read_header(path)


def test_a_chunk_longer_than_its_file_is_not_made_room_for(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    Image.new("RGB", (32, 24)).save(path)
    content = path.read_bytes()
    start = content.index(b"IDAT") - 4
    path.write_bytes(content[:start] + (2**30).to_bytes(4) + content[start + 4 :])
    with pytest.raises(UnreadableFile, match="a chunk says it has 1073741824 bytes, in a file of 81: it is damaged"):
        read_header(path)

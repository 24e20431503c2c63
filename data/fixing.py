"""`fix`: what has one remedy is put right in a copy of a dataset's raw files; the originals keep their bytes."""

from __future__ import annotations

import os
import struct
from collections import Counter
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
from filelock import FileLock
from ruamel.yaml import YAML

from data.card import DatasetCard, load_card
from data.coco_fixing import fix_coco
from data.coco_layout import find_layout
from data.decode import UndecodableImage, read_bgr
from data.headers import SUFFIXES, Header, oddities, orientation_at, read_header
from data.images import leads_out
from data.importing import copy_contents, remove
from data.label_files import UnreadableFile
from data.problems import ImportRefused
from data.reading import READERS, read_labels
from data.records import ImageRecord
from data.whole_file import write_whole

# Parameters with which OpenCV writes a type without loss; JPEG has none.
_LOSSLESS: dict[str, list[int]] = {"PNG": [], "BMP": [], "TIFF": [], "WEBP": [cv2.IMWRITE_WEBP_QUALITY, 101]}


class _Remedy(NamedTuple):
    """What is done to one picture: its new bytes, None where they stay, its name after that, and what is put right."""

    content: bytes | None
    name: str
    kinds: tuple[str, ...]


def fix(name: str, repo: Path) -> Counter[str]:
    """Put right what can be without guessing, and return how often, by kind; nothing to do changes nothing.

    `data/raw/<name>`, a link or a copy, is replaced by a corrected copy in the same format, at once or not at all; a
    folder that was linked is not touched. In it, of pictures in any format:

    - a wrong suffix is corrected, and COCO's file_name with it; not for YOLO, whose lists name files,
    - an EXIF orientation is set to upright, if the picture's record has the frame of the stored pixels,
    - more than 8 bits a channel, and transparency, become the 8-bit pixels that training reads, without loss of these;

    and of COCO labels what `fix_coco` says. Everything else is left: it needs a person, or preparation mends it. No
    picture changes split: one that its new content or name would move is pinned in the card.

    Raises:
        UnknownDataset, InvalidCard: see `load_card`.
        ImportRefused: the folder holds something that is no file, or a picture is a link that leads out of it.
        OSError: the copy cannot be made, such as on a full disk. In both cases nothing has changed.
    """
    card = load_card(name, repo / "data" / "catalog")
    raw = repo / "data" / "raw" / name
    partial, old = (raw.with_name(f".{name}.{suffix}") for suffix in ("fixed", "old"))
    locks = repo / ".dvc" / "tmp"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"speck-import-{name}.lock"):
        # A process that was killed between the two renamings below.
        if os.path.lexists(old) and not os.path.lexists(raw):
            old.rename(raw)
        if card.format not in READERS or not raw.is_dir() or not _fixed(card, raw, write=False).counts:
            return Counter()
        try:
            remove(partial)
            copy_contents(raw, partial)
            fixed = _fixed(card, partial, write=True)
            _keep_splits(card, partial, fixed, repo / "data" / "catalog" / f"{name}.yaml")
            remove(old)
            raw.rename(old)
            partial.rename(raw)
        finally:
            remove(partial)
        remove(old)
    return fixed.counts


class _Fixed(NamedTuple):
    """`renamed`: old -> new name; `splits`: split by new name, as it was before."""

    counts: Counter[str]
    renamed: dict[str, str]
    splits: dict[str, str]


def _fixed(card: DatasetCard, folder: Path, *, write: bool) -> _Fixed:
    """Put a folder right; without `write` only find out whether there is anything to do."""
    found = read_labels(card.format, folder, card.classes, card.splits)
    counts: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    splits: dict[str, str] = {}
    for split, content in found.splits.items():
        for record in content.images:
            remedy = _remedy(found.divider.images, record, can_rename=card.format != "yolo")
            splits[remedy.name] = split
            counts.update(remedy.kinds)
            if write:
                _apply(found.divider.images, record.file_name, remedy)
            if remedy.name != record.file_name:
                renamed[record.file_name] = remedy.name
    if card.format == "coco":
        layout = find_layout(folder)
        for file in (file for files in layout.files.values() for file in files):
            counts += fix_coco(file, layout.images, renamed, write=write)
    return _Fixed(counts, renamed, splits)


def _apply(images: Path, name: str, remedy: _Remedy) -> None:
    path = images / name
    if remedy.content is not None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(remedy.content)
        partial.replace(path)
    if remedy.name != name:
        path.rename(images / remedy.name)


def _remedy(images: Path, record: ImageRecord, *, can_rename: bool) -> _Remedy:
    path, name = images / record.file_name, record.file_name
    if leads_out(path, Path(os.path.realpath(images))):
        # A copy would make it one of the dataset's own files, which nobody has decided.
        raise ImportRefused(
            f"{path}: a link that leads out of the folder of images. Put the file in its place, then fix"
        )
    try:
        header = read_header(path)
    except (FileNotFoundError, UnreadableFile):
        return _Remedy(None, name, ())
    odd = oddities(header, name)
    content = None
    kinds: list[str] = [kind for kind in ("orientation", "16 bits", "alpha") if kind in odd]
    if kinds and (header.width_px, header.height_px) == (record.width_px, record.height_px):
        content = _upright(path, header) if kinds == ["orientation"] else None
        content = content or _as_read(path, header)
    kinds = kinds if content is not None else []
    if can_rename and "suffix" in odd:
        right = PurePosixPath(name).with_suffix(SUFFIXES[header.format][0]).as_posix()
        if not os.path.lexists(images / right):
            name, kinds = right, [*kinds, "suffix"]
    return _Remedy(content, name, tuple(kinds))


def _upright(path: Path, header: Header) -> bytes | None:
    """Return the file with an orientation of 1 in its EXIF block, all else to the byte; None where that cannot be."""
    place = orientation_at(header.exif)
    content = path.read_bytes()
    # The chunks of a PNG have check sums.
    if place is None or header.format not in ("JPEG", "WEBP") or content.count(header.exif) != 1:
        return None
    offset, order = place
    start = content.index(header.exif) + offset
    return content[:start] + struct.pack(f"{order}H", 1) + content[start + 2 :]


def _as_read(path: Path, header: Header) -> bytes | None:
    """Return a file of the same type with the pixels that `read_bgr` gives; None where something else would be lost."""
    if header.format not in _LOSSLESS or header.is_animated or header.mode in ("I", "F", "CMYK"):
        return None
    try:
        pixels = read_bgr(path)
    except UndecodableImage:
        return None
    is_grey = bool((pixels == pixels[..., :1]).all())
    written = pixels[..., 0] if is_grey else pixels
    _, encoded = cv2.imencode(SUFFIXES[header.format][0], written, _LOSSLESS[header.format])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return encoded.tobytes() if decoded is not None and np.array_equal(decoded, pixels) else None


def _keep_splits(card: DatasetCard, folder: Path, fixed: _Fixed, card_file: Path) -> None:
    """Pin in the card the pictures that a fixed folder's new bytes and names would move; pins follow a new name."""
    pinned: dict[str, list[str]] = {
        split: [fixed.renamed.get(name, name) for name in names] for split, names in card.splits.pinned.items()
    }
    rule = card.splits.model_copy(update={"pinned": pinned})
    found = read_labels(card.format, folder, card.classes, rule)
    now = {record.file_name: split for split, content in found.splits.items() for record in content.images}
    moved = {name: split for name, split in fixed.splits.items() if now.get(name) != split}
    if card.splits.rule == "given" or (not moved and pinned == {k: [*v] for k, v in card.splits.pinned.items()}):
        return
    for name, split in moved.items():
        pinned.setdefault(split, []).append(name)
    editor = YAML()
    content = editor.load(card_file.read_text(encoding="utf-8"))
    content["splits"]["pinned"] = pinned
    text = StringIO()
    editor.dump(content, text)
    write_whole(card_file, text.getvalue())

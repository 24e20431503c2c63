"""Drawn pictures of a dataset's report: whole, with their boxes, and their smallest objects enlarged beside them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from cv2.typing import MatLike

from data.colours import class_colour
from data.decode import read_bgr
from data.page import jpeg_uri, png_uri
from data.records import XYWH, Box, ImageRecord

NUM_PICTURES = 8
NUM_ENLARGED = 4
_SIDE_PX = 420
_ENLARGED_PX = 98
# An object smaller than this on the page is shown enlarged as well.
_LEGIBLE_PX = 24
_MIN_WINDOW_PX = 24
_CONTEXT = 2.0
_JPEG_QUALITY = 85


class Chosen(NamedTuple):
    """A picture and why it is shown."""

    record: ImageRecord
    why: str


def chosen(records: Sequence[ImageRecord], classes: Sequence[str]) -> list[Chosen]:
    """Choose NUM_PICTURES: extremes first, then one picture per class from the rarest up, then evenly through the rest.

    The extremes are most objects, the smallest object, the largest ignored area and no object at all.
    """
    found: dict[int, Chosen] = {}

    def add(record: ImageRecord, why: str) -> None:
        if len(found) < NUM_PICTURES:
            found.setdefault(record.image_id, Chosen(record, why))

    with_objects = [record for record in records if _objects(record)]
    if with_objects:
        add(max(with_objects, key=lambda record: len(_objects(record))), "most objects")
        add(min(with_objects, key=lambda record: min(box.area_px for box in _objects(record))), "smallest object")
    if any(map(_ignored_px, records)):
        add(max(records, key=_ignored_px), "most ignored area")
    if len(with_objects) < len(records):
        add(next(record for record in records if not _objects(record)), "no object")
    images_of = [[r for r in records if any(b.label == label for b in _objects(r))] for label in range(len(classes))]
    for label in sorted(range(len(classes)), key=lambda label: len(images_of[label])):
        new = [record for record in images_of[label] if record.image_id not in found]
        if new and len(found) < NUM_PICTURES - 2:
            add(new[len(new) // 2], f"with {classes[label]}")
    rest = [record for record in records if record.image_id not in found]
    room = NUM_PICTURES - len(found)
    for place in np.unique(np.linspace(0, len(rest) - 1, min(room, len(rest))).astype(int)).tolist():
        add(rest[place], "one of the others")
    return list(found.values())


def drawn(picture: Chosen, images: Path, classes: Sequence[str]) -> str:
    """A figure in HTML. Boxes are SVG over the picture and tell class and size when pointed at; dashed is ignored."""
    record = picture.record
    pixels = read_bgr(images / record.file_name)
    zoom = min(_SIDE_PX / max(record.width_px, record.height_px), 3.0)
    whole = _svg(pixels, record, (0, 0, record.width_px, record.height_px), zoom, classes)
    small = sorted((box for box in _objects(record) if _side_px(box) * zoom < _LEGIBLE_PX), key=lambda box: box.area_px)
    enlarged = "".join(_enlarged(pixels, record, box, classes) for box in small[:NUM_ENLARGED])
    note = f"objects: {len(_objects(record))}, {record.width_px}x{record.height_px} px"
    return (
        f"<figure>{whole}<figcaption><b>{escape(picture.why)}</b> {escape(record.file_name)} · {note}</figcaption>"
        f'<div class="enlarged">{enlarged}</div></figure>'
    )


def _enlarged(pixels: MatLike, record: ImageRecord, box: Box, classes: Sequence[str]) -> str:
    x, y, w, h = box.box_xywh_px
    side = min(max(_MIN_WINDOW_PX, round(_CONTEXT * max(w, h))), record.width_px, record.height_px)
    left = int(np.clip(x + w / 2 - side / 2, 0, record.width_px - side))
    top = int(np.clip(y + h / 2 - side / 2, 0, record.height_px - side))
    view = _svg(pixels, record, (left, top, side, side), _ENLARGED_PX / side, classes)
    return f"<div>{view}<small>{escape(classes[box.label])}<br>{w:g}x{h:g}</small></div>"


def _svg(
    pixels: MatLike,
    record: ImageRecord,
    window_xywh_px: tuple[int, int, int, int],
    zoom: float,
    classes: Sequence[str],
) -> str:
    """A window of the picture with what is marked in it, drawn `zoom` times as large."""
    x, y, w, h = window_xywh_px
    part = pixels[y : y + h, x : x + w]
    if zoom < 1:
        part = cv2.resize(part, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    uri = jpeg_uri(part, _JPEG_QUALITY) if zoom < 4 else png_uri(part)
    marks = [_mark(region, 'class="ignored"', "ignore region") for region in record.ignore_xywh_px]
    for box in sorted(record.boxes, key=lambda box: not box.is_crowd):
        width, height = box.box_xywh_px[2:]
        title = f"{classes[box.label]}{', crowd' if box.is_crowd else ''}, {width:g}x{height:g} px"
        style = 'class="ignored"' if box.is_crowd else f'stroke="{class_colour(box.label)}"'
        marks.append(_mark(box.box_xywh_px, style, title))
    return (
        f'<svg viewBox="{x} {y} {w} {h}" width="{w * zoom:.0f}" height="{h * zoom:.0f}" class="boxes">'
        f'<image x="{x}" y="{y}" width="{w}" height="{h}" preserveAspectRatio="none" '
        f'href="{uri}"/>{"".join(marks)}</svg>'
    )


def _mark(box_xywh_px: XYWH, style: str, title: str) -> str:
    x, y, w, h = box_xywh_px
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" {style}><title>{escape(title)}</title></rect>'


def _objects(record: ImageRecord) -> list[Box]:
    return [box for box in record.boxes if not box.is_crowd]


def _ignored_px(record: ImageRecord) -> float:
    regions = [*record.ignore_xywh_px, *(box.box_xywh_px for box in record.boxes if box.is_crowd)]
    return sum(w * h for _, _, w, h in regions)


def _side_px(box: Box) -> float:
    return min(box.box_xywh_px[2:])

"""Pictures with what became of their objects and detections; the smallest missed objects stand enlarged beside.

Boxes are SVG over the picture: sharp at any size, and telling class, score and size when pointed at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import ceil
from typing import Any, NamedTuple

import cv2
import numpy as np
from cv2.typing import MatLike

from data.colours import PALETTE
from data.page import jpeg_uri, png_uri
from evaluation.matching import ImageMatches

NUM_ENLARGED = 6
# Of one picture, in base64, for each pixel it is shown wide: twelve of them with their boxes stay below 5 MB.
MAX_BYTES_PER_PX = 300
ENLARGED_PX = 132
# Side, in those that the picture is shown at, for sharp screens and print, and JPEG quality.
_ENCODINGS = ((2.0, 88), (2.0, 75), (2.0, 60), (1.6, 60), (1.2, 60), (0.8, 50))
_MAX_ZOOM = 3.0
_MAX_SHOWN_HEIGHT_PX = 900
_MIN_WINDOW_PX = 12
# An object smaller than this on the page is shown enlarged as well.
_LEGIBLE_PX = 24
_SCALES_PX = (50, 20, 10, 5, 2, 1)


class Style(NamedTuple):
    """How an outcome is drawn: on a line of the colour `below`, so that it shows on pixels of any colour.

    The marker at the box's upper right corner is a path in pixels of the page; small boxes have smaller ones.
    """

    words: str
    colour: str
    below: str
    dashes: str
    marker: str


# Of all triples of the palette one of those told apart best under protanopia, deuteranopia and tritanopia alike.
STYLES = {
    "ignored": Style("not scored", "#B8BEC6", "#000", "1 3", ""),
    "hit": Style("found", PALETTE[1], "#000", "none", ""),
    "miss": Style("missed", PALETTE[6], "#000", "5 3", "m0,-3a4,4,0,1,0,8,0a4,4,0,1,0,-8,0"),
    "false": Style("false positive", PALETTE[3], "#fff", "6 2 1.5 2", "m0,-7l7,7m0,-7l-7,7"),
}


class Mark(NamedTuple):
    """One box, and what it says when pointed at; `outcome` is one of `STYLES`."""

    outcome: str
    box_xywh_px: Sequence[float]
    title: str


def worst(matches: Iterable[ImageMatches], num_images: int) -> list[ImageMatches]:
    """The images with most errors, misses and false positives, and of equals those of lower F1; none without errors."""
    wrong = [found for found in matches if _num_errors(found)]
    return sorted(wrong, key=lambda found: (-_num_errors(found), found.f1 or 0.0, found.image_id))[:num_images]


def marks_of(
    found: ImageMatches,
    annotations: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
) -> list[Mark]:
    """What is to be drawn: detections, ground truths that were missed, and what is not scored."""

    def mark(outcome: str, row: Mapping[str, Any]) -> Mark:
        score = f" {row['score']:.2f}" if "score" in row else ""
        w, h = row["bbox"][2:]
        name = class_names[row["category_id"]]
        return Mark(outcome, row["bbox"], f"{STYLES[outcome].words}: {name}{score}, {_size(w, h)} px")

    return [
        *(mark("ignored", annotations[row]) for row in found.ignored_annotations),
        *(mark("ignored", detections[row]) for row in found.ignored_detections),
        *(mark("hit", detections[row]) for _, row in found.hits),
        *(mark("false", detections[row]) for row in found.false_positives),
        *(mark("miss", annotations[row]) for row in found.misses),
    ]


def whole(
    pixels_bgr: MatLike, marks: Sequence[Mark], regions_xywh_px: Iterable[Sequence[float]], label: str, shown_px: int
) -> str:
    """The picture with its marks as SVG, up to `shown_px` wide, and not more than three times its size."""
    height_px, width_px = pixels_bgr.shape[:2]
    zoom = shown_zoom(pixels_bgr, shown_px)
    uri = _small_uri(pixels_bgr, shown_px)
    regions = "".join(f'<rect {_place(region)} class="ignored"/>' for region in regions_xywh_px)
    return _drawing(uri, (0, 0, width_px, height_px), zoom, regions + _drawn(marks, 1 / zoom), label)


def shown_zoom(pixels_bgr: MatLike, shown_px: int) -> float:
    """How many times as large as it is `whole` shows a picture."""
    height_px, width_px = pixels_bgr.shape[:2]
    zoom: float = min(shown_px / width_px, _MAX_SHOWN_HEIGHT_PX / height_px, _MAX_ZOOM)
    return zoom


def enlarged(
    pixels_bgr: MatLike, marks: Sequence[Mark], objects: Iterable[Mapping[str, Any]], class_names: Mapping[int, str],
    zoom: float,
) -> str:  # fmt: skip
    """The smallest of the objects that are hard to see in a picture shown at `zoom`, each at a whole multiple.

    Pixels stay squares. Below each view stand its class and size, and a bar says how long so many pixels are.
    """
    tiny = [
        row for row in objects
        if min(row["bbox"][2:]) * zoom < _LEGIBLE_PX and _window_px(row["bbox"]) <= ENLARGED_PX
    ]  # fmt: skip
    tiny.sort(key=lambda row: row["bbox"][2] * row["bbox"][3])
    views = [_view(pixels_bgr, marks, row["bbox"], class_names[row["category_id"]]) for row in tiny[:NUM_ENLARGED]]
    return f'<div class="enlarged">{"".join(views)}</div>' if views else ""


def legend() -> str:
    """What the lines and markers stand for."""
    entries = "".join(
        f'<span class="swatch"><svg class="sample" width="46" height="24"><rect width="46" height="24" fill="#57606a"/>'
        f"{_drawn([Mark(outcome, (10, 8, 26, 11), '')], 1)}</svg>{style.words}</span>"
        for outcome, style in STYLES.items()
    )
    return f'<p class="legend">{entries}</p>'


def _view(pixels_bgr: MatLike, marks: Sequence[Mark], box_xywh_px: Sequence[float], name: str) -> str:
    x, y, w, h = box_xywh_px
    height_px, width_px = pixels_bgr.shape[:2]
    side_px = min(_window_px(box_xywh_px), width_px, height_px)
    left = int(np.clip(x + w / 2 - side_px / 2, 0, width_px - side_px))
    top = int(np.clip(y + h / 2 - side_px / 2, 0, height_px - side_px))
    zoom = max(ENLARGED_PX // side_px, 1)
    near = [mark for mark in marks if _overlaps(mark.box_xywh_px, left, top, side_px)]
    uri = png_uri(np.ascontiguousarray(pixels_bgr[top : top + side_px, left : left + side_px]))
    label = f"missed: {name}, {_size(w, h)} px, {zoom} times enlarged"
    drawing = _drawing(uri, (left, top, side_px, side_px), zoom, _drawn(near, 1 / zoom), label)
    scale_px = next(scale for scale in _SCALES_PX if scale <= max(side_px / 3, 1))
    return (
        f'<div>{drawing}<small><i class="scale" style="width:{scale_px * zoom}px"></i>{scale_px} px<br>'
        f"{escape(name)}<br>{_size(w, h)} px, {zoom}x</small></div>"
    )


def _window_px(box_xywh_px: Sequence[float]) -> int:
    return max(_MIN_WINDOW_PX, ceil(2 * max(box_xywh_px[2:])))


def _overlaps(box_xywh_px: Sequence[float], left: float, top: float, side: float) -> bool:
    x, y, w, h = box_xywh_px
    return x < left + side and x + w > left and y < top + side and y + h > top


def _drawing(uri: str, window_xywh_px: tuple[int, int, int, int], zoom: float, marks: str, label: str) -> str:
    x, y, w, h = window_xywh_px
    return (
        f'<svg viewBox="{x} {y} {w} {h}" width="{w * zoom:.0f}" height="{h * zoom:.0f}" class="boxes" role="img" '
        f'aria-label="{escape(label)}"><image x="{x}" y="{y}" width="{w}" height="{h}" preserveAspectRatio="none" '
        f'href="{uri}"/>{marks}</svg>'
    )


def _drawn(marks: Sequence[Mark], px: float) -> str:
    """Boxes by outcome, errors on top; `px` is a pixel of the page in those of the picture."""
    groups = []
    for outcome, style in STYLES.items():
        boxes = [mark for mark in marks if mark.outcome == outcome]
        if not boxes:
            continue
        outlines = "".join(
            f"M{x:.1f},{y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}z" for x, y, w, h in (mark.box_xywh_px for mark in boxes)
        )
        rects = "".join(
            f"<rect {_place(mark.box_xywh_px)}><title>{escape(mark.title)}</title></rect>" for mark in boxes
        )
        corners = "".join(
            f'<path transform="translate({x + w:.1f},{y:.1f})scale({px * _marker_scale(min(w, h) / px):.3f})" '
            f'd="{style.marker}"/>'
            for x, y, w, h in (mark.box_xywh_px for mark in boxes)
            if style.marker
        )
        groups.append(
            f'<path class="below" stroke="{style.below}" d="{outlines}"/><g class="{outcome}" '
            f'stroke="{style.colour}"><g stroke-dasharray="{style.dashes}">{rects}</g>{corners}</g>'
        )
    return "".join(groups)


def _marker_scale(side_px: float) -> float:
    """So that the marker of a box with this shorter side on the page leaves its neighbours to be seen."""
    return min(max(side_px / 16, 0.5), 1.0)


def _place(box_xywh_px: Sequence[float]) -> str:
    x, y, w, h = (f"{round(value, 1):g}" for value in box_xywh_px)
    return f'x="{x}" y="{y}" width="{w}" height="{h}"'


def _small_uri(pixels_bgr: MatLike, shown_px: int) -> str:
    uri = ""
    for density, quality in _ENCODINGS:
        scale = density * shown_px / max(pixels_bgr.shape[:2])
        small = (
            pixels_bgr if scale >= 1 else cv2.resize(pixels_bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        )
        uri = jpeg_uri(small, quality)
        if len(uri) <= MAX_BYTES_PER_PX * shown_px:
            break
    return uri


def _num_errors(found: ImageMatches) -> int:
    return len(found.misses) + len(found.false_positives)


def _size(width: float, height: float) -> str:
    return f"{round(width, 1):g}x{round(height, 1):g}"

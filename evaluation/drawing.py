"""Detections drawn on their picture."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cv2.typing import MatLike

from data.colours import class_colour

# A box of two pixels is seen on a picture of a thousand.
_PICTURE_PX_PER_LINE_PX = 500
_FONT_PX_PER_LINE_PX = 6
# Sum of red, green and blue from which black letters are read better than white ones.
_BRIGHT = 3 * 110


def draw_detections(
    pixels_bgr: MatLike, detections: Sequence[Mapping[str, Any]], class_names: Mapping[int, str]
) -> MatLike:
    """Return a copy of a picture with the boxes of COCO results on it, class and score above each.

    Lines lie outside the boxes: what was detected stays visible, however small it is. `class_names` by category id,
    from which colours follow as in all other pictures.
    """
    from PIL import Image, ImageDraw

    image = Image.fromarray(cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2RGB))
    line_px = max(1, round(max(image.size) / _PICTURE_PX_PER_LINE_PX))
    font_px = max(9, _FONT_PX_PER_LINE_PX * line_px)
    pen, font = ImageDraw.Draw(image), _font(font_px)
    place = {category_id: number for number, category_id in enumerate(class_names)}
    # The best on top.
    for detection in sorted(detections, key=lambda detection: detection["score"]):
        x, y, w, h = detection["bbox"]
        colour = class_colour(place[detection["category_id"]])
        corner_px = (x - line_px, y - line_px)
        pen.rectangle((*corner_px, x + w + line_px, y + h + line_px), outline=colour, width=line_px)
        text = f"{class_names[detection['category_id']]} {detection['score']:.2f}"
        left, _, right, bottom = pen.textbbox((0, 0), text, font=font)
        x_px = min(max(corner_px[0], 0), max(image.width - (right - left), 0))
        y_px = corner_px[1] - bottom - line_px
        if y_px < 0:
            y_px = y + h + 2 * line_px
        # On a ground of its colour: an outline of small letters would leave nothing of them.
        pen.rectangle(pen.textbbox((x_px, y_px), text, font=font), fill=colour)
        pen.text((x_px, y_px), text, font=font, fill="black" if _is_bright(colour) else "white")
    return cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)


def _is_bright(colour: str) -> bool:
    return sum(bytes.fromhex(colour.removeprefix("#"))) > _BRIGHT


@functools.cache
def _font(size_px: int) -> Any:
    """matplotlib's font: it has the letters of most languages, where Pillow's own has those of English."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size_px)

"""The labelled objects of `sample-aerial` as small coloured drawings, rasterised with sub-pixel exact boxes.

A drawing is a list of layers in its own unit and its own two axes: forward and left for what is seen flat, along and
up for what stands upright. `axes` (2, 2) says where these lie in the picture, so that one drawing serves as object and,
with its `up` laid along the ground, as cast shadow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

VEHICLE, PERSON, BOAT, BICYCLE = range(4)
SUPERSAMPLING = 4

Colour = tuple[int, int, int]
Points = npt.NDArray[np.float64]

CAR_PAINTS: tuple[Colour, ...] = (
    (232, 234, 235), (205, 208, 210), (150, 150, 148), (62, 60, 60), (40, 42, 160), (52, 58, 205), (150, 80, 35),
    (200, 120, 40), (60, 190, 225), (70, 110, 50), (120, 165, 190), (30, 110, 210),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (50, 50, 215), (215, 110, 40), (40, 185, 235), (235, 235, 235), (45, 40, 45), (150, 60, 170), (60, 150, 60),
    (40, 120, 240), (180, 170, 60), (190, 130, 230),
)  # fmt: skip
HAIR: tuple[Colour, ...] = ((25, 30, 40), (40, 65, 100), (90, 160, 200), (130, 130, 135), (60, 60, 190))
HULLS: tuple[Colour, ...] = (
    (238, 240, 240), (225, 230, 232), (160, 90, 40), (50, 60, 180), (45, 90, 145), (70, 70, 75), (60, 150, 205),
)  # fmt: skip
FRAMES: tuple[Colour, ...] = (
    (40, 40, 225),
    (40, 200, 240),
    (225, 190, 40),
    (235, 235, 235),
    (60, 190, 60),
    (220, 70, 200),
)
GLASS: Colour = (58, 46, 36)
SKIN: Colour = (120, 160, 210)


_CIRCLE = np.array([(math.cos(k * math.pi / 7), math.sin(k * math.pi / 7)) for k in range(14)])


@dataclass(frozen=True)
class Layer:
    """A filled polygon (`stroke` 0) or a polyline of that width; `points` (N, 2) in the drawing's unit."""

    points: Points
    bgr: Colour
    stroke: float = 0.0


@dataclass(frozen=True)
class Sprite:
    """A rasterised drawing, cut at the image's border; the patch's pixel (0, 0) is the image's (`left_px`, `top_px`).

    `premultiplied_bgr` (h, w, 3) and `alpha` (h, w) uint8; `box_xyxy_px` is tight around the mask, to a quarter pixel;
    `visible_share` is what the border leaves of the object; `origin_px` is where the drawing's (0, 0) came to lie.
    """

    premultiplied_bgr: npt.NDArray[np.uint8]
    alpha: npt.NDArray[np.uint8]
    left_px: int
    top_px: int
    box_xyxy_px: tuple[float, float, float, float]
    visible_share: float
    scale_px: float
    origin_px: Points

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image under the patch."""
        height, width = self.alpha.shape
        return slice(self.top_px, self.top_px + height), slice(self.left_px, self.left_px + width)


def polygon(*xy: float) -> Points:
    """Points (N, 2) from x0, y0, x1, y1, ..."""
    return np.array(xy, dtype=np.float64).reshape(-1, 2)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """Points (14, 2) on an ellipse parallel to the axes."""
    return _CIRCLE * (rx, ry) + (x, y)


def turn(heading_rad: float) -> Points:
    """Axes (2, 2) of a drawing seen flat whose forward direction points along the heading."""
    c, s = math.cos(heading_rad), math.sin(heading_rad)
    return np.array([[c, s], [-s, c]])


def _shade(bgr: Colour, factor: float) -> Colour:
    b, g, r = (min(255, max(0, round(channel * factor))) for channel in bgr)
    return b, g, r


def _pick(rng: np.random.Generator, palette: tuple[Colour, ...]) -> Colour:
    return _shade(palette[int(rng.integers(len(palette)))], float(rng.uniform(0.88, 1.08)))


def vehicle(rng: np.random.Generator) -> list[Layer]:
    """A car, van, pickup, lorry or bus from above; the first layer is its outline."""
    paint = _pick(rng, CAR_PAINTS)
    kind = ("car", "car", "car", "van", "pickup", "lorry")[int(rng.integers(6))]
    a, w = {"car": (2.2, 0.98), "van": (2.5, 1.08), "pickup": (2.5, 1.05), "lorry": (3.1, 1.2)}[kind]
    outline = polygon(a, -w * 0.6, a * 0.93, -w * 0.9, a * 0.7, -w, -a * 0.9, -w, -a, -w * 0.8,
                      -a, w * 0.8, -a * 0.9, w, a * 0.7, w, a * 0.93, w * 0.9, a, w * 0.6)  # fmt: skip
    # The flanks fall away from the light: a darker rim.
    layers = [Layer(outline, _shade(paint, 0.6)), Layer(outline * (0.93, 0.82), paint)]
    if kind == "lorry":
        box = _pick(rng, CAR_PAINTS)
        layers += [Layer(polygon(a * 0.72, -w * 0.8, a * 0.9, -w * 0.7, a * 0.9, w * 0.7, a * 0.72, w * 0.8), GLASS)]
        layers += [Layer(polygon(a * 0.5, -w, -a, -w, -a, w, a * 0.5, w), box)]
        layers += [Layer(polygon(x * a, -w * 0.9, x * a, w * 0.9), _shade(box, 0.78), 0.14) for x in (-0.7, -0.3, 0.1)]
        layers += [Layer(polygon(a * 0.5, -w, a * 0.5, w), _shade(paint, 0.4), 0.16)]
    else:
        roof_end = {"car": -0.42, "van": -0.86, "pickup": -0.1}[kind]
        layers += [
            Layer(
                polygon(
                    a * 0.42, -w * 0.86, a * 0.42, w * 0.86, roof_end * a - 0.35, w * 0.8, roof_end * a - 0.35, -w * 0.8
                ),
                GLASS,
            ),
            Layer(
                polygon(a * 0.14, -w * 0.66, a * 0.14, w * 0.66, roof_end * a, w * 0.66, roof_end * a, -w * 0.66),
                _shade(paint, 1.2),
            ),
        ]
        if kind == "pickup":
            bed = polygon(-a * 0.36, -w * 0.78, -a * 0.36, w * 0.78, -a * 0.93, w * 0.78, -a * 0.93, -w * 0.78)
            layers += [Layer(bed, _shade(paint, 0.5))]
    for side in (-1, 1):
        layers += [Layer(polygon(a * 0.95, side * w * 0.45, a * 0.86, side * w * 0.8), (225, 245, 250), 0.2)]
        layers += [Layer(polygon(-a * 0.96, side * w * 0.4, -a * 0.96, side * w * 0.8), (30, 30, 200), 0.2)]
    return layers


def boat(rng: np.random.Generator) -> list[Layer]:
    """A motor, sailing or rowing boat from above; the first layer is its outline."""
    hull = _pick(rng, HULLS)
    w = float(rng.uniform(0.72, 1.0))
    outline = polygon(
        2.6, 0, 1.9, -w * 0.5, 1.0, -w * 0.92, 0, -w, -2.0, -w * 0.85, -2.1, w * 0.85, 0, w, 1.0, w * 0.92, 1.9, w * 0.5
    )
    inner = outline * 0.78 - np.array([0.1, 0.0])
    layers = [Layer(outline, hull)]
    kind = int(rng.integers(3))
    if kind == 0:
        cabin = _pick(rng, ((240, 240, 240), (200, 150, 90), (90, 90, 100)))
        layers += [
            Layer(inner, _shade(hull, 0.82)),
            Layer(polygon(0.7, -w * 0.5, 0.9, 0, 0.7, w * 0.5, -0.6, w * 0.58, -0.6, -w * 0.58), cabin),
            Layer(polygon(0.72, -w * 0.45, 0.95, 0, 0.72, w * 0.45), GLASS, 0.26),
            Layer(polygon(-0.8, -w * 0.55, -0.8, w * 0.55, -1.8, w * 0.5, -1.8, -w * 0.5), (60, 95, 130)),
        ]
    elif kind == 1:
        layers += [
            Layer(inner, (120, 165, 195)),
            Layer(polygon(-1.7, 0, 0.4, 0), (245, 245, 240), 0.3),
            Layer(polygon(0.4, -w * 0.8, 0.4, w * 0.8), (60, 60, 60), 0.14),
            Layer(polygon(-1.2, -w * 0.5, -1.2, w * 0.5), (70, 60, 55), 0.5),
        ]
    else:
        layers += [Layer(inner, _shade(hull, 0.45))]
        layers += [Layer(polygon(x, -w * 0.85, x, w * 0.85), (110, 150, 185), 0.34) for x in (-1.0, 0.1, 1.1)]
    return layers


def person(rng: np.random.Generator) -> list[Layer]:
    """A standing or walking person seen obliquely, the feet at the origin."""
    shirt, trousers, hair = _pick(rng, CLOTHES), _shade(_pick(rng, CLOTHES), 0.55), _pick(rng, HAIR)
    stride, width = float(rng.uniform(0.08, 0.34)), float(rng.uniform(0.33, 0.42))
    swing = float(rng.uniform(-0.2, 0.2))
    return [
        Layer(polygon(-0.14, 0.7, -stride, 0.05), trousers, 0.26),
        Layer(polygon(0.14, 0.7, stride, 0.08), _shade(trousers, 0.8), 0.26),
        Layer(polygon(-width * 0.8, 1.1, -width - 0.06, 0.72 + swing), _shade(shirt, 0.85), 0.2),
        Layer(polygon(width * 0.8, 1.1, width + 0.06, 0.72 - swing), _shade(shirt, 0.75), 0.2),
        Layer(ellipse(0, 0.92, width, 0.4), shirt),
        Layer(ellipse(0, 1.4, 0.25, 0.25), SKIN),
        Layer(ellipse(0, 1.46, 0.24, 0.19), hair),
    ]


def bicycle(rng: np.random.Generator) -> list[Layer]:
    """A bicycle without a rider seen obliquely, standing on the ground at the origin."""
    frame = _pick(rng, FRAMES)
    tyre, steel = (38, 36, 36), (150, 150, 150)
    rear, front, crank, saddle, head = (-0.56, 0.36), (0.56, 0.36), (-0.06, 0.36), (-0.22, 0.88), (0.4, 0.84)
    layers = []
    for x, y in (rear, front):
        rim = ellipse(x, y, 0.34, 0.34)
        layers += [Layer(np.concatenate([rim, rim[:1]]), tyre, 0.12), Layer(ellipse(x, y, 0.07, 0.07), steel)]
    for start, end in ((rear, crank), (crank, head), (saddle, head), (saddle, crank), (rear, saddle), (head, front)):
        layers += [Layer(polygon(*start, *end), frame, 0.13)]
    layers += [
        Layer(polygon(saddle[0] - 0.14, 0.92, saddle[0] + 0.12, 0.92), tyre, 0.12),
        Layer(polygon(head[0] - 0.02, 0.84, head[0] + 0.04, 1.04, head[0] - 0.12, 1.06), tyre, 0.13),
    ]
    return layers


def rasterise(
    layers: list[Layer], axes: Points, long_side_px: float, centre_xy_px: tuple[float, float], image_size_px: int
) -> Sprite | None:
    """The drawing scaled until its points span `long_side_px`, centred there; None when wholly outside the image."""
    s = SUPERSAMPLING
    points = np.concatenate([layer.points for layer in layers]) @ axes
    low, high = points.min(axis=0), points.max(axis=0)
    scale_px = long_side_px / float((high - low).max())
    margin = max(layer.stroke for layer in layers) * scale_px / 2 + 1.5
    half = (high - low) * scale_px / 2 + margin
    left, top = math.floor(centre_xy_px[0] - half[0]), math.floor(centre_xy_px[1] - half[1])
    width, height = math.ceil(2 * half[0]) + 1, math.ceil(2 * half[1]) + 1
    x0, y0 = max(0, -left), max(0, -top)
    x1, y1 = min(width, image_size_px - left), min(height, image_size_px - top)
    if x0 >= x1 or y0 >= y1:
        return None
    origin = np.array(centre_xy_px) - (low + high) * (scale_px / 2)
    fixed = np.rint((points * scale_px + origin - (left, top)) * s).astype(np.int32)
    bgr = np.zeros((height * s, width * s, 3), np.uint8)
    mask = np.zeros((height * s, width * s), np.uint8)
    start = 0
    for layer in layers:
        part = [fixed[start : start + len(layer.points)]]
        start += len(layer.points)
        if layer.stroke:
            thickness = max(1, round(layer.stroke * scale_px * s))
            cv2.polylines(bgr, part, False, layer.bgr, thickness)
            cv2.polylines(mask, part, False, 255, thickness)
        else:
            cv2.fillPoly(bgr, part, layer.bgr)
            cv2.fillPoly(mask, part, 255)
    inside = mask[y0 * s : y1 * s, x0 * s : x1 * s]
    visible = cv2.countNonZero(inside)
    if not visible:
        return None
    left, top, size = left + x0, top + y0, (x1 - x0, y1 - y0)
    x, y, w, h = cv2.boundingRect(inside)
    return Sprite(
        premultiplied_bgr=_area(bgr[y0 * s : y1 * s, x0 * s : x1 * s], size),
        alpha=_area(inside, size),
        left_px=left,
        top_px=top,
        box_xyxy_px=(left + x / s, top + y / s, left + (x + w) / s, top + (y + h) / s),
        visible_share=visible / cv2.countNonZero(mask),
        scale_px=scale_px,
        origin_px=origin,
    )


def _area(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)

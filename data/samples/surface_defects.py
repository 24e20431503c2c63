"""The defects of `sample-surface`, drawn four times as fine as the picture so that their boxes are exact.

What tells them apart is what they are: a scratch is a long groove of fresh metal, a pit a hollow with a lit and a dark
side, an inclusion an angular foreign grain that covers the texture, a stain a film with a rim that lets it through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from data.samples.surface_texture import Colour, Field, Image, Plate

SCRATCH, PIT, INCLUSION, STAIN = range(4)
SUPERSAMPLING = 4
# Shortest and longest; small ones are the most frequent.
LONG_SIDES_PX = {SCRATCH: (16.0, 56.0), PIT: (9.0, 26.0), INCLUSION: (10.0, 34.0), STAIN: (16.0, 80.0)}
# A thinner box would be a matter of how its pixels are rounded.
MIN_SHORT_SIDE_PX = 8.0

_MARGIN_PX = 3
# Slag, rust, flux and brass, whose grey level follows from the metal they lie in.
_FOREIGN: tuple[Colour, ...] = ((136, 98, 80), (56, 88, 142), (80, 116, 80), (76, 146, 164))
# Heat tints, oil and verdigris, likewise.
_FILMS: tuple[Colour, ...] = ((46, 98, 160), (164, 92, 62), (128, 64, 122), (68, 132, 152), (118, 124, 52))

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Defect:
    """A drawing (h, w) to be laid on a plate at some pixel.

    `cover` and `opacity` (h, w) uint8, `relief` (h, w) in grey levels, `bgr` the colour under `opacity`;
    `box_xyxy_px` is tight around the drawing, to a quarter pixel, counted from the patch's corner.
    """

    label: int
    cover: Image
    opacity: Image
    relief: Field
    bgr: Colour
    box_xyxy_px: tuple[float, float, float, float]


def defect(rng: np.random.Generator, label: int, plate: Plate, faint: bool) -> Defect:
    """A defect of the class on this metal; a faint one has nearly the grey level of the metal."""
    low, high = LONG_SIDES_PX[label]
    long_side_px = low * (high / low) ** float(rng.random() ** 1.6)
    if label == SCRATCH:
        return _scratch(rng, plate, long_side_px, faint)
    if label == PIT:
        return _pit(rng, plate, long_side_px, faint)
    if label == INCLUSION:
        return _inclusion(rng, plate, long_side_px, faint)
    return _stain(rng, plate, long_side_px, faint)


def lay_over(image: Image, item: Defect, left_px: int, top_px: int) -> None:
    """Lay the drawing over the picture (H, W, 3), its patch's corner at that pixel."""
    height, width = item.cover.shape
    part = image[top_px : top_px + height, left_px : left_px + width]
    below, weight = part.astype(np.int32), item.opacity.astype(np.int32)[..., None]
    laid = below + (np.array(item.bgr, np.int32) - below) * weight // 255 + item.relief[..., None]
    part[...] = np.clip(laid, 0, 255)


def _scratch(rng: np.random.Generator, plate: Plate, long_side_px: float, faint: bool) -> Defect:
    t = np.linspace(-0.5, 0.5, 13)
    # Across the grooves at some angle: along them it would be one of them.
    while True:
        heading_rad = plate.groove_rad + float(rng.uniform(0.35, math.pi - 0.35))
        bow, wobble = float(rng.uniform(-0.6, 0.6)), np.cumsum(rng.uniform(-0.012, 0.012, len(t)))
        fixed, shape = _fit(np.stack([t, bow * (t**2) + wobble], axis=1) @ _turn(heading_rad), long_side_px)
        if np.ptp(fixed, axis=0).min() >= MIN_SHORT_SIDE_PX * SUPERSAMPLING:
            break
    width_px = float(rng.uniform(2.2, 3.4)) * (0.9 + long_side_px / 150)
    mask, pressure = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    # The tool chatters: it presses more here and less there.
    for k, level in enumerate(rng.integers(110, 256, len(t) - 1).tolist()):
        taper = min(1.0, 0.45 + 2.2 * (0.5 - abs(t[k] + t[k + 1]) / 2))
        start, end = fixed[k].tolist(), fixed[k + 1].tolist()
        thickness = max(3, round(width_px * taper * SUPERSAMPLING))
        cv2.line(mask, start, end, 255, thickness)
        cv2.line(pressure, start, end, level, thickness)
    bright = rng.random() < 0.7
    gain = int(rng.integers(26, 40)) if faint else int(rng.integers(48, 80))
    relief = _lit(mask, plate.light_rad, 3, 2, gain)
    bgr = _moved(plate.bgr, int(rng.integers(60, 95)) if bright else -int(rng.integers(55, 85)))
    return _finished(SCRATCH, mask, pressure, 140 if faint else int(rng.integers(205, 255)), relief, bgr)


def _pit(rng: np.random.Generator, plate: Plate, long_side_px: float, faint: bool) -> Defect:
    outline = _blob(rng, 0.1) * (1.0, float(rng.uniform(0.68, 1.0))) @ _turn(float(rng.uniform(0, math.pi)))
    fixed, shape = _fit(outline, long_side_px)
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [fixed], 255)
    depth_px = max(1.0, long_side_px * 0.16)
    gain = int(rng.integers(45, 65)) if faint else int(rng.integers(75, 125))
    relief = _lit(mask, plate.light_rad, round(depth_px * SUPERSAMPLING), round(depth_px * SUPERSAMPLING * 0.8), gain)
    floor = np.asarray(cv2.blur(mask, (2 * round(depth_px * 2) + 1,) * 2), np.uint8) & mask
    bgr = _moved(plate.bgr, -int(rng.integers(60, 100)))
    return _finished(PIT, mask, floor, 40 if faint else int(rng.integers(70, 130)), relief, bgr)


def _inclusion(rng: np.random.Generator, plate: Plate, long_side_px: float, faint: bool) -> Defect:
    num = int(rng.integers(5, 9))
    angles = (np.arange(num) + rng.uniform(-0.3, 0.3, num)) * (2 * math.pi / num)
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.55, 1.0, num)[:, None]
    corners = corners * (1.0, float(rng.uniform(0.4, 0.95))) @ _turn(float(rng.uniform(0, math.pi)))
    fixed, shape = _fit(corners, long_side_px)
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [fixed], 255)
    bgr = _FOREIGN[int(rng.integers(len(_FOREIGN)))]
    contrast = int(rng.integers(-14, 15)) if faint else int(rng.choice((-1, 1))) * int(rng.integers(18, 50))
    bgr = _moved(bgr, _grey(plate.bgr) - _grey(bgr) + contrast)
    # Facets of a broken grain: a few flat shades, and the thin gap at its border.
    facets = np.zeros(shape, np.int16)
    middle = fixed.mean(axis=0).astype(np.int32)
    for k, shade in enumerate((rng.integers(14, 52, num) * rng.choice((-1, 1), num)).tolist()):
        cv2.fillPoly(facets, [np.array([middle, fixed[k], fixed[(k + 1) % num]])], shade)
    cv2.polylines(facets, [fixed], True, -46 if _grey(bgr) > 70 else 40, SUPERSAMPLING)
    return _finished(INCLUSION, mask, mask, 240, facets.astype(np.int32), bgr)


def _stain(rng: np.random.Generator, plate: Plate, long_side_px: float, faint: bool) -> Defect:
    outline = _blob(rng, 0.3) * (1.0, float(rng.uniform(0.6, 1.0))) @ _turn(float(rng.uniform(0, math.pi)))
    fixed, shape = _fit(outline, long_side_px)
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [fixed], 255)
    inner = cv2.blur(mask, (2 * round(long_side_px * 0.3) + 1,) * 2).astype(np.int32)
    film, rim = (int(rng.integers(80, 110)), 90) if faint else (int(rng.integers(125, 170)), 85)
    level = film + (255 - inner) * rim // 255
    opacity = np.asarray(cv2.blur((level * (mask > 0)).astype(np.uint8), (9, 9)), np.uint8)
    bgr = _FILMS[int(rng.integers(len(_FILMS)))]
    contrast = int(rng.integers(-10, 11)) if faint else -int(rng.integers(15, 60))
    bgr = _moved(bgr, _grey(plate.bgr) - _grey(bgr) + contrast)
    return _finished(STAIN, mask, opacity, 255, np.zeros(shape, np.int32), bgr)


def _blob(rng: np.random.Generator, unevenness: float) -> Points:
    """A smooth closed outline (40, 2) around 0."""
    angles = np.arange(40) * (2 * math.pi / 40)
    radii = np.ones(40)
    for k in (2, 3, 4, 5):
        radii += unevenness * float(rng.uniform(0, 1)) / math.sqrt(k) * np.cos(k * angles + float(rng.uniform(0, 6.3)))
    return np.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None])


def _turn(angle_rad: float) -> Points:
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    return np.array([[c, s], [-s, c]])


def _fit(points: Points, long_side_px: float) -> tuple[npt.NDArray[np.int32], tuple[int, int]]:
    """The points (N, 2) in fine pixels so that they span `long_side_px`, and the (height, width) of their patch."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = long_side_px / float((high - low).max())
    width, height = (math.ceil(side) + 2 * _MARGIN_PX for side in ((high - low) * scale).tolist())
    fixed = np.rint(((points - low) * scale + _MARGIN_PX) * SUPERSAMPLING).astype(np.int32)
    return fixed, (height * SUPERSAMPLING, width * SUPERSAMPLING)


def _lit(mask: Image, light_rad: float, softness: int, reach: int, gain: int) -> Field:
    """Grey levels of a hollow of this shape: dark on the side of the light, bright on the other."""
    height = np.asarray(cv2.blur(mask, (2 * (softness // 2) + 1,) * 2), np.int32)
    dx, dy = round(reach * math.cos(light_rad)), round(reach * math.sin(light_rad))
    slope = np.roll(height, (dy, dx), (0, 1)) - np.roll(height, (-dy, -dx), (0, 1))
    return np.asarray(slope * gain // 255 * (cv2.dilate(mask, np.ones((3, 3), np.uint8)) > 0))


def _grey(bgr: Colour) -> int:
    return (114 * bgr[0] + 587 * bgr[1] + 299 * bgr[2]) // 1000


def _moved(bgr: Colour, levels: int) -> Colour:
    b, g, r = (min(255, max(0, channel + levels)) for channel in bgr)
    return b, g, r


def _finished(label: int, mask: Image, opacity: Image, level: int, relief: Field, bgr: Colour) -> Defect:
    """From fine pixels to the picture's."""
    x, y, w, h = (side / SUPERSAMPLING for side in cv2.boundingRect(mask))
    weight = _area(opacity.astype(np.int32)) * level // 255
    cover, opacity = _area(mask.astype(np.int32)).astype(np.uint8), weight.astype(np.uint8)
    return Defect(label, cover, opacity, _area(relief), bgr, (x, y, x + w, y + h))


def _area(fine: Field) -> Field:
    """Mean of every block of fine pixels."""
    s = SUPERSAMPLING
    height, width = fine.shape[0] // s, fine.shape[1] // s
    return np.asarray(fine.reshape(height, s, width, s).sum(axis=(1, 3)) // (s * s))

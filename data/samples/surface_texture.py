"""Metal, machining marks, light and camera of `sample-surface`.

Pixel arithmetic is integer, so that the bytes, and with them the dataset's version, do not depend on threads or on the
processor's vector units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

BRUSHED, CAST, GRAIN = range(3)

Image = npt.NDArray[np.uint8]
Field = npt.NDArray[np.int32]
Colour = tuple[int, int, int]

_SHIFT = 4
# Steel, aluminium, brass, copper, oxidised iron, titanium.
_METALS: tuple[Colour, ...] = (
    (132, 130, 128), (172, 170, 168), (104, 146, 164), (104, 126, 158), (94, 100, 108), (126, 120, 114),
)  # fmt: skip
_INKS: tuple[Colour, ...] = ((150, 84, 62), (62, 92, 150), (80, 132, 72), (64, 128, 152), (132, 72, 128))


@dataclass(frozen=True)
class Plate:
    """A flawless surface: `image_bgr` (H, W, 3), its mean colour, the direction of its grooves and of the light."""

    image_bgr: Image
    bgr: Colour
    groove_rad: float
    light_rad: float


def plate(rng: np.random.Generator, size_px: int) -> Plate:
    """A piece of metal under even light, now and then two that meet at a seam, or with the marks of a cutter."""
    metal = _METALS[int(rng.integers(len(_METALS)))]
    common = int(rng.integers(-34, 35))
    b, g, r = (channel + common + int(own) for channel, own in zip(metal, rng.integers(-6, 7, 3), strict=True))
    groove_rad, light_rad = float(rng.uniform(0, math.pi)), float(rng.uniform(0, 2 * math.pi))
    kind, strength = int(rng.integers(3)), int(rng.integers(28, 72))
    shade = _relief(rng, kind, size_px, groove_rad, light_rad) * strength
    if rng.random() < 0.25:
        side = _across(size_px, float(rng.uniform(0, 2 * math.pi))) + int(rng.integers(-size_px // 4, size_px // 4))
        other = _relief(rng, kind, size_px, groove_rad + float(rng.uniform(0.3, 1.2)), light_rad) * strength
        shade = np.where(side > 0, shade, other + int(rng.integers(-2200, 2200)))
        shade[np.abs(side) <= int(rng.integers(0, 3))] += int(rng.choice((-5200, 4200)))
    if rng.random() < 0.5:
        shade += _cutter_marks(rng, size_px) * int(rng.choice((-34, 26)))
    # Codes and numbers are etched or printed, and paint is sprayed near by: colour alone means nothing.
    printed: list[Field] = []
    if rng.random() < 0.65:
        codes = _matrix_codes(rng, size_px)
        if rng.random() < 0.4:
            printed.append(codes)
        else:
            shade += codes * int(rng.choice((-60, -40, 44)))
    for _ in range(int(rng.integers(0, 4))):
        text = _lettering(rng, size_px)
        if rng.random() < 0.7:
            printed.append(text)
        else:
            shade += text * int(rng.choice((-64, -44, 48)))
    if rng.random() < 0.9:
        printed += [_overspray(rng, size_px) for _ in range(int(rng.integers(2, 5)))]
    factor = np.clip(256 + (shade >> 7), 64, 480)
    image = np.clip(np.array([b, g, r], np.int32) * factor[..., None] >> 8, 0, 255)
    for marks in printed:
        image = _inked(rng, image, marks)
    return Plate(image.astype(np.uint8), (b, g, r), groove_rad, light_rad)


def _inked(rng: np.random.Generator, image: Field, marks: Field) -> Field:
    """The picture (H, W, 3) with `marks` (H, W), 0..255, in one ink, of nearly the metal's grey level or not."""
    ink = np.array(_INKS[int(rng.integers(len(_INKS)))], np.int32)
    grey = int(image.mean()) - int(ink.mean()) + int(rng.integers(-85, 45))
    opacity = marks[..., None] * int(rng.integers(150, 240)) // 255
    return np.asarray(np.clip(image + (ink + grey - image) * opacity // 255, 0, 255))


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells_y: int, cells_x: int) -> Field:
    """Smooth noise (shape) in -128..127."""
    grid = rng.integers(0, 256, (cells_y, cells_x), dtype=np.uint8)
    return np.asarray(cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_LINEAR_EXACT), np.int32) - 128


def _across(size_px: int, direction_rad: float) -> Field:
    """Signed distance in pixels (size, size) from the line through the centre that is normal to the direction."""
    c, s = round(math.cos(direction_rad) * 1024), round(math.sin(direction_rad) * 1024)
    along = np.arange(size_px, dtype=np.int32) - size_px // 2
    return np.asarray(along[None, :] * c + along[:, None] * s >> 10)


def _relief(rng: np.random.Generator, kind: int, size_px: int, groove_rad: float, light_rad: float) -> Field:
    """Brightness (size, size) of a texture about 0, mostly in -128..127."""
    coarseness = float(rng.uniform(0.7, 1.7))
    blotches = _noise(rng, (size_px, size_px), 4, 4) + _noise(rng, (size_px, size_px), 9, 9)
    dots = rng.integers(-128, 128, (size_px, size_px), dtype=np.int8).astype(np.int32)
    if kind == BRUSHED:
        return (_grooves(rng, size_px, groove_rad, coarseness) * 3 + blotches + dots) // 4
    if kind == CAST:
        return (_orange_peel(rng, size_px, light_rad, coarseness) * 4 + blotches + dots) // 4
    return (_crystals(rng, size_px, groove_rad, coarseness) * 3 + blotches + dots) // 4


def _grooves(rng: np.random.Generator, size_px: int, groove_rad: float, coarseness: float) -> Field:
    """The fine parallel lines of a brush or a belt."""
    side = size_px * 3 // 2
    table = np.zeros((side, side), np.int32)
    for line_px, length_px in ((1.5, 90), (3.0, 150), (9.0, 220)):
        table += _noise(rng, (side, side), int(side / (line_px * coarseness)), max(2, side // length_px))
    u, v = _across(size_px, groove_rad), _across(size_px, groove_rad + math.pi / 2)
    return np.asarray(table[v + side // 2, u + side // 2]) // 2


def _orange_peel(rng: np.random.Generator, size_px: int, light_rad: float, coarseness: float) -> Field:
    """The bumps that a mould leaves, lit from one side."""
    side = size_px + 8
    height = np.zeros((side, side), np.int32)
    for bump_px, weight in ((3.0, 1), (6.0, 2), (14.0, 3)):
        cells = int(side / (bump_px * coarseness))
        height += weight * _noise(rng, (side, side), cells, cells)
    dx, dy = round(2 * math.cos(light_rad)), round(2 * math.sin(light_rad))
    towards = height[4 + dy : 4 + dy + size_px, 4 + dx : 4 + dx + size_px]
    away = height[4 - dy : 4 - dy + size_px, 4 - dx : 4 - dx + size_px]
    return np.asarray(away - towards) // 3


def _crystals(rng: np.random.Generator, size_px: int, groove_rad: float, coarseness: float) -> Field:
    """Grains of unlike brightness with dark boundaries: the two nearest of one seed a cell of a jittered grid."""
    cell = max(6, int(11 * coarseness))
    u, v = _across(size_px, groove_rad) + size_px, _across(size_px, groove_rad + math.pi / 2) + size_px
    # Rolled material: grains are longer along the grooves.
    u = u * int(rng.integers(9, 17)) >> 4
    num = 2 * size_px // cell + 3
    seed_u, seed_v = rng.integers(0, cell, (2, num, num), dtype=np.int32)
    grey = rng.integers(-110, 111, (num, num), dtype=np.int32)
    column, row = u // cell, v // cell
    nearest, second = np.full(u.shape, 1 << 30, np.int32), np.full(u.shape, 1 << 30, np.int32)
    shade = np.zeros(u.shape, np.int32)
    for j in (-1, 0, 1):
        for i in (-1, 0, 1):
            x, y = np.clip(column + i, 0, num - 1), np.clip(row + j, 0, num - 1)
            distance = (x * cell + seed_u[y, x] - u) ** 2 + (y * cell + seed_v[y, x] - v) ** 2
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            shade = np.where(closer, grey[y, x], shade)
            nearest = np.where(closer, distance, nearest)
    # second - nearest grows linearly across a boundary, by twice the distance of the seeds for every pixel.
    shade[second - nearest < 2 * cell] -= 90
    return shade


def _cutter_marks(rng: np.random.Generator, size_px: int) -> Field:
    """Evenly spaced arcs through the whole picture (size, size), 0..255: the feed of a mill or a lathe."""
    marks = np.zeros((size_px, size_px), np.uint8)
    distance, around = float(rng.uniform(0.8, 4.0)) * size_px, float(rng.uniform(0, 2 * math.pi))
    centre = [round((size_px / 2 + distance * f(around)) * (1 << _SHIFT)) for f in (math.cos, math.sin)]
    spacing = int(rng.integers(12, 36))
    for radius in range(int(distance) - size_px, int(distance) + size_px, spacing):
        if radius > 0:
            cv2.circle(marks, (centre[0], centre[1]), radius << _SHIFT, 255, 1, cv2.LINE_AA, _SHIFT)
    return marks.astype(np.int32)


def _lettering(rng: np.random.Generator, size_px: int) -> Field:
    """An etched part number (size, size), 0..255, upright or turned by quarters."""
    marks = np.zeros((size_px, size_px), np.uint8)
    scale = float(rng.uniform(0.32, 0.55))
    left, line = int(rng.integers(-20, size_px * 2 // 3)), int(rng.integers(16, size_px - 40))
    for row in range(int(rng.integers(2, 6))):
        text = "".join(rng.choice(list("ABCDEFHKLMNPRTXYZ0123456789-/"), int(rng.integers(6, 16))).tolist())
        origin = left, line + row * round(36 * scale)
        cv2.putText(marks, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1, cv2.LINE_AA)
    return np.rot90(marks, int(rng.integers(4))).astype(np.int32)


def _overspray(rng: np.random.Generator, size_px: int) -> Field:
    """Drops of paint around some place (size, size), 0..255: round, soft, too small for an inclusion."""
    drops = np.zeros((size_px, size_px), np.uint8)
    centre, spread = rng.integers(0, size_px, 2), int(rng.integers(20, 90))
    for x, y in (centre + rng.integers(-spread, spread + 1, (int(rng.integers(8, 26)), 2))).tolist():
        radius = int(rng.integers(14, 58))
        cv2.circle(drops, (x << _SHIFT, y << _SHIFT), radius, 255, -1, cv2.LINE_AA, _SHIFT)
    return drops.astype(np.int32)


def _matrix_codes(rng: np.random.Generator, size_px: int) -> Field:
    """Some square codes (size, size) of etched modules, 0 or 255."""
    marks = np.zeros((size_px, size_px), np.int32)
    for _ in range(int(rng.integers(1, 4))):
        module, num = int(rng.integers(3, 7)), int(rng.integers(8, 15))
        modules = rng.integers(0, 2, (num, num), dtype=np.int32) * 255
        modules[:, 0] = modules[-1] = 255
        code = np.kron(modules, np.ones((module, module), np.int32))
        top, left = rng.integers(0, size_px - len(code) + 1, 2).tolist()
        marks[top : top + len(code), left : left + len(code)] = code
    return marks


def _glints(rng: np.random.Generator, size_px: int) -> Field:
    """Soft round reflections (size, size) without an edge, in 1/256 of the light."""
    light = np.zeros((size_px, size_px), np.int32)
    along = np.arange(size_px, dtype=np.int32)
    for _ in range(int(rng.integers(1, 7))):
        (x, y), radius = rng.integers(0, size_px, 2).tolist(), int(rng.integers(5, 26))
        inside = np.maximum(0, radius**2 - (along[None, :] - x) ** 2 - (along[:, None] - y) ** 2)
        light += inside * inside // radius**2 * int(rng.integers(30, 110)) // radius**2
    return light


def photograph(rng: np.random.Generator, image: Image) -> Image:
    """The picture under the station's lamp and camera: gradient, glare, vignetting, dust, softness, cast, noise."""
    size = image.shape[0]
    light = 256 + _across(size, float(rng.uniform(0, 2 * math.pi))) * int(rng.integers(0, 110)) // size
    band = np.abs(_across(size, float(rng.uniform(0, 2 * math.pi))) + int(rng.integers(-size // 2, size // 2)))
    light += np.maximum(0, size // 3 - band) * int(rng.integers(0, 70)) // (size // 3)
    if rng.random() < 0.4:
        light += _glints(rng, size)
    along = np.arange(size, dtype=np.int32) - size // 2
    light -= (along[None, :] ** 2 + along[:, None] ** 2) * int(rng.integers(0, 90)) // (size * size // 2)
    lit = np.clip(image * light[..., None] >> 8, 0, 255)
    for _ in range(int(rng.integers(0, 26))):
        y, x = rng.integers(0, size - 1, 2).tolist()
        h, w = rng.integers(1, 3, 2).tolist()
        lit[y : y + h, x : x + w] += int(rng.integers(-22, 30))
    image = np.clip(lit, 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        image = np.asarray(cv2.GaussianBlur(image, (3, 3), float(rng.uniform(0.3, 0.65))), np.uint8)
    gain, offset = int(rng.integers(225, 290)), int(rng.integers(-8, 16))
    levels = np.arange(256)[:, None] * (gain + rng.integers(-14, 15, 3)) // 256 + offset
    exposed = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8)[None])
    noise = rng.integers(-128, 128, image.shape, dtype=np.int8).astype(np.int16) + rng.integers(
        -128, 128, image.shape, dtype=np.int8
    )
    return np.asarray(np.clip(exposed + (noise * int(rng.integers(2, 12)) >> 8), 0, 255), np.uint8)

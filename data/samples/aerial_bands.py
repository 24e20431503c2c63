"""The bands of `sample-aerial`: streets, car parks, houses, squares, parks, fields, beaches, marinas and the sea."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np

from data.samples.aerial_ground import (
    ASPHALT,
    GRASS,
    PAVING,
    SAND,
    SHIFT,
    SOIL,
    WATER,
    WOOD,
    Ground,
    Roof,
    tint,
)
from data.samples.aerial_objects import BICYCLE, BOAT, PERSON, VEHICLE, Colour, polygon

Band = Literal["road", "parking", "houses", "square", "park", "field", "beach", "marina", "sea"]
BAND_WIDTHS: dict[Band, tuple[float, float]] = {
    "road": (52, 64), "parking": (66, 76), "houses": (75, 105), "square": (62, 105), "park": (55, 100),
    "field": (70, 120), "beach": (40, 60), "marina": (125, 165), "sea": (110, 160),
}  # fmt: skip
LAYOUTS: tuple[tuple[Band, ...], ...] = (
    ("houses", "road", "park", "parking", "houses", "road", "square"),
    ("houses", "road", "square", "marina", "square", "road", "houses"),
    ("park", "square", "marina", "park", "road", "parking", "houses"),
    ("field", "road", "park", "beach", "sea", "beach", "park"),
    ("houses", "parking", "square", "marina", "sea", "beach", "park"),
    ("field", "road", "park", "sea", "park", "road", "field"),
    ("parking", "road", "square", "park", "square", "road", "houses"),
)


def lay_out(rng: np.random.Generator, size_px: int, scale: float) -> Ground:
    """Choose and paint the bands, and note what stands on them."""
    grass = ((52, 112, 88), (60, 128, 116), (70, 130, 140), (48, 96, 76))[int(rng.integers(4))]
    water = ((98, 80, 38), (112, 104, 62), (86, 92, 66), (120, 92, 44))[int(rng.integers(4))]
    colours = {
        GRASS: tint(rng, grass),
        SOIL: tint(rng, (92, 126, 158), 16),
        ASPHALT: tint(rng, (104, 102, 100), 18),
        PAVING: tint(rng, (148, 156, 162), 18),
        SAND: tint(rng, (150, 186, 206)),
        WATER: tint(rng, water),
        WOOD: tint(rng, (92, 122, 146)),
    }
    layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    widths = [float(rng.uniform(*BAND_WIDTHS[band])) for band in layout]
    edges = np.concatenate([[0.0], np.cumsum(widths)])
    shape = (size_px, size_px)
    ground = Ground(
        rng=rng,
        size_px=size_px,
        scale=scale,
        angle_rad=float(rng.uniform(0, 2 * math.pi)),
        origin_v=float(edges[-1] * rng.uniform(0.36, 0.64)),
        cross_u=float(rng.uniform(-0.4, 0.4)) * size_px / scale if rng.random() < 0.5 else math.inf,
        canvas=np.full((*shape, 3), colours[GRASS], np.uint8),
        zone=np.full(shape, GRASS, np.uint8),
        foam=np.zeros(shape, np.uint8),
        colours=colours,
    )
    reach = ground.half_u * 1.1
    bands = list(zip(layout, edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    # The sea comes last, because its shores are uneven.
    for band, v0, v1 in sorted(bands, key=lambda item: item[0] == "sea"):
        if v1 > ground.origin_v - reach and v0 < ground.origin_v + reach:
            _PAINTERS[band](ground, v0, v1)
    land = cv2.dilate((ground.zone != WATER).astype(np.uint8), np.ones((7, 7), np.uint8))
    ground.foam *= land.astype(np.uint8)
    return ground


def _across(g: Ground, v0: float, v1: float) -> None:
    """The crossing street's piece of a land band, with its cars."""
    cross = g.cross_u
    if cross == math.inf:
        return
    g.rectangle(cross - 24, v0 - 1, cross + 24, v1 + 1, tint(g.rng, g.colours[PAVING], 4), PAVING)
    g.rectangle(cross - 17, v0 - 1, cross + 17, v1 + 1, g.colours[ASPHALT], ASPHALT)
    for v in np.arange(v0 + 6, v1 - 6, 22):
        g.rectangle(cross - 0.8, v, cross + 0.8, v + 11, (215, 218, 218))
    for lane, heading in ((-8.5, math.pi / 2), (8.5, -math.pi / 2)):
        for v in np.arange(v0 + 14, v1 - 10, 34):
            if g.rng.random() < 0.25:
                g.spot(VEHICLE, cross + lane, float(v + g.rng.uniform(-6, 6)), heading, moving=True)


def _road(g: Ground, v0: float, v1: float) -> None:
    u, white = g.half_u, (218, 222, 222)
    g.rectangle(-u, v0, u, v1, tint(g.rng, g.colours[PAVING], 6), PAVING)
    a, b = v0 + 9, v1 - 9
    g.rectangle(-u, a, u, b, g.colours[ASPHALT], ASPHALT)
    g.rectangle(-u, a - 1.6, u, a, tint(g.rng, (175, 178, 180), 6))
    g.rectangle(-u, b, u, b + 1.6, tint(g.rng, (175, 178, 180), 6))
    middle = (a + b) / 2
    g.rectangle(-u, a + 2, u, a + 3, white)
    g.rectangle(-u, b - 3, u, b - 2, white)
    yellow = (70, 190, 225) if g.rng.random() < 0.35 else white
    for x in np.arange(-u, u, 24):
        g.rectangle(x, middle - 0.8, x + 12, middle + 0.8, yellow)
    crossing = g.between(-0.8, 0.8) * u if g.cross_u == math.inf else g.cross_u + 34
    for v in np.arange(a + 3, b - 3, 5):
        g.rectangle(crossing - 7, v, crossing + 7, v + 2.6, white)
    traffic = g.between(0.1, 0.5)
    for v, heading in (((a + middle) / 2, 0.0), ((b + middle) / 2, math.pi)):
        arrow = g.between(-u, u)
        g.rectangle(arrow - 6, v - 0.7, arrow + 4, v + 0.7, white)
        g.fill(polygon(arrow + 8, v, arrow + 2, v - 2.6, arrow + 2, v + 2.6), white)
        for x in np.arange(-u, u, 44):
            if g.rng.random() < traffic:
                g.spot(VEHICLE, x + g.between(-6, 6), v + g.between(-1.5, 1.5), heading, moving=True)
    for _ in g.times(3, 8):
        v = (v0 + 4.5, v1 - 4.5)[int(g.rng.integers(2))]
        label = PERSON if g.rng.random() < 0.5 else BICYCLE
        g.spot(label, g.between(-u, u), v, float(g.rng.choice((0.0, math.pi))))
    for _ in g.times(1, 5):
        x, y = g.to_px(np.array([[g.between(-u, u), middle + g.between(-9, 9)]]))[0]
        cv2.circle(
            g.canvas, (round(x), round(y)), max(1, round(2 * g.scale)), tint(g.rng, (70, 70, 72)), -1, cv2.LINE_AA
        )
    if g.rng.random() < 0.6:
        for x in np.arange(-u, u, g.between(30, 60)):
            g.tree(x + g.between(-5, 5), v0 + 2, g.between(6, 10))


def _parking(g: Ground, v0: float, v1: float) -> None:
    u, white = g.half_u, (205, 210, 212)
    start = g.between(-0.8, 0.1) * u
    end = start + 14.5 * int(g.rng.integers(6, 14))
    g.rectangle(start - 16, v0, end + 16, v1, tint(g.rng, g.colours[ASPHALT], 10), ASPHALT)
    occupied = g.between(0.15, 0.6)
    for row, (base, depth) in enumerate(((v0 + 3, 26), (v1 - 29, 26))):
        g.rectangle(start, base + (0 if row == 0 else depth) - 0.6, end, base + (0 if row == 0 else depth) + 0.6, white)
        for x in np.arange(start, end, 14.5):
            g.rectangle(x - 0.6, base, x + 0.6, base + depth, white)
            if g.rng.random() < occupied and x + 14.5 < end:
                heading = math.pi / 2 * (1 if g.rng.random() < 0.5 else -1)
                g.spot(VEHICLE, x + 7.25, base + depth / 2 + g.between(-1.5, 1.5), heading)
    if g.rng.random() < 0.5:
        g.crate(
            end + 2,
            (v0 + v1) / 2 - 4,
            g.between(8, 11),
            g.between(16, 26),
            tint(g.rng, _CRATES[int(g.rng.integers(4))]),
        )
    for _ in g.times(1, 4):
        g.spot(PERSON, g.between(start, end), (v0 + v1) / 2 + g.between(-5, 5), 0.0)
    _across(g, v0, v1)


def _houses(g: Ground, v0: float, v1: float) -> None:
    u = g.half_u
    g.rectangle(-u, v0, u, v1, tint(g.rng, g.colours[GRASS]), GRASS)
    _across(g, v0, v1)
    roofs = ((60, 78, 150), (78, 90, 112), (120, 118, 118), (92, 100, 172), (150, 152, 156))
    style, x = int(g.rng.integers(len(roofs))), -u + g.between(0, 30)
    while x < u:
        length, depth = g.between(42, 84), g.between(36, min(58, v1 - v0 - 22))
        if x + length > g.cross_u - 30 and x < g.cross_u + 30:
            x = g.cross_u + 34
            continue
        low = v0 + g.between(8, max(9, v1 - v0 - depth - 8))
        corners = g.to_px(polygon(x, low, x + length, low, x + length, low + depth, x, low + depth))
        gabled = bool(g.rng.random() < 0.65)
        bgr = tint(g.rng, roofs[style] if gabled else (150, 154, 156), 14)
        g.roofs.append(Roof(corners, g.between(8, 16) * g.scale, bgr, gabled))
        if g.rng.random() < 0.5:
            g.rectangle(x + length + 3, v0, x + length + 15, v1, tint(g.rng, g.colours[PAVING]), PAVING)
            g.spot(VEHICLE, x + length + 9, low + g.between(0, depth), math.pi / 2)
        else:
            g.tree(x + length + 10, low + g.between(0, depth), g.between(8, 15))
        g.tree(x + g.between(0, length), float(g.rng.choice((v0 + 3, v1 - 3))), g.between(4, 9))
        x += length + g.between(16, 30)


def _crowd(g: Ground, u: float, v: float, num: int, spread: float) -> None:
    for du, dv in g.rng.uniform(-1, 1, (num, 2)) + g.rng.uniform(-1, 1, (num, 2)):
        g.spot(PERSON, u + float(du) * spread, v + float(dv) * spread, 0.0)


def _rack(g: Ground, u: float, v: float, num: int) -> None:
    heading, step = g.between(0, 2 * math.pi), g.between(15, 20)
    g.rectangle(u - 6, v - 8, u + num * step - 4, v + 8, tint(g.rng, g.colours[PAVING]), PAVING)
    for index in range(num):
        g.spot(BICYCLE, u + index * step, v, heading)


def _square(g: Ground, v0: float, v1: float) -> None:
    u, rng = g.half_u, g.rng
    base = tint(rng, g.colours[PAVING], 8)
    g.rectangle(-u, v0, u, v1, base, PAVING)
    joint, step = tint(rng, (base[0] - 16, base[1] - 16, base[2] - 16), 3), g.between(8, 18)
    for x in np.arange(-u, u, step):
        g.rectangle(x, v0, x + 0.9, v1, joint)
    for v in np.arange(v0, v1, step):
        g.rectangle(-u, v, u, v + 0.9, joint)
    for _ in g.times(1, 3):
        _crowd(
            g,
            g.between(-0.7, 0.7) * u,
            g.between(v0 + 15, v1 - 15),
            int(rng.integers(4, 9)),
            g.between(12, 26),
        )
    for _ in g.times(1, 4):
        _rack(g, g.between(-0.8, 0.6) * u, g.between(v0 + 12, v1 - 12), int(rng.integers(2, 7)))
    for _ in g.times(2, 6):
        length, width = (float(side) for side in rng.uniform(5, 14, 2))
        at, v = g.between(-u, u), g.between(v0 + 8, v1 - 8)
        g.crate(at, v, length, width, _CRATES[int(rng.integers(len(_CRATES)))])
    for x in np.arange(-u + 20, u, g.between(50, 90)):
        g.rectangle(x - 7, v1 - 18, x + 7, v1 - 4, tint(rng, g.colours[GRASS]), GRASS)
        g.tree(x, v1 - 11, g.between(5, 11))


_PARASOLS: tuple[Colour, ...] = ((70, 80, 205), (215, 225, 228), (190, 130, 60), (90, 190, 225))
_CRATES: tuple[Colour, ...] = ((70, 110, 150), (150, 150, 150), (120, 90, 60), (70, 70, 150))


def _park(g: Ground, v0: float, v1: float) -> None:
    u, rng = g.half_u, g.rng
    g.rectangle(-u, v0, u, v1, tint(rng, g.colours[GRASS], 14), GRASS)
    x = np.linspace(-u, u, 24)
    middle = (v0 + v1) / 2 + np.cumsum(rng.uniform(-1, 1, 24)) * 3
    path = np.concatenate([np.stack([x, middle - 5], 1), np.stack([x, middle + 5], 1)[::-1]])
    g.fill(path, tint(rng, (138, 164, 180), 12), SAND)
    _across(g, v0, v1)
    for index in rng.integers(1, 23, int(rng.integers(3, 8))):
        label = PERSON if rng.random() < 0.5 else BICYCLE
        g.spot(
            label,
            float(x[index] + rng.uniform(-8, 8)),
            float(middle[index] + rng.uniform(-3, 3)),
            float(rng.choice((0.0, math.pi))),
        )
    if rng.random() < 0.5:
        _crowd(g, g.between(-0.6, 0.6) * u, g.between(v0 + 12, v1 - 12), int(rng.integers(4, 11)), 20)
    for _ in g.times(1, 5):
        g.spot(BICYCLE, g.between(-u, u), g.between(v0 + 8, v1 - 8), g.between(0, 2 * math.pi))
    for _ in g.times(0, 6):
        g.lump(g.between(-u, u), g.between(v0 + 4, v1 - 4), g.between(1.5, 4.5), 0.3, tint(rng, (138, 142, 145), 20))
    for _ in g.times(5, 16):
        g.tree(g.between(-u, u), g.between(v0 + 4, v1 - 4), g.between(3, 16))


def _field(g: Ground, v0: float, v1: float) -> None:
    u, rng = g.half_u, g.rng
    x = -u
    while x < u:
        end = x + g.between(90, 220)
        bgr = tint(rng, (g.colours[SOIL], (70, 140, 120), (80, 150, 175))[int(rng.integers(3))], 14)
        furrow = tint(rng, (int(bgr[0] * 0.82), int(bgr[1] * 0.84), int(bgr[2] * 0.84)), 4)
        g.rectangle(x, v0, end, v1, bgr, SOIL)
        step = g.between(4.5, 8)
        if rng.random() < 0.5:
            for v in np.arange(v0, v1, step):
                g.rectangle(x, v, end, v + step * 0.4, furrow)
        else:
            for w in np.arange(x, end, step):
                g.rectangle(w, v0, w + step * 0.4, v1, furrow)
        g.rectangle(end - 5, v0, end, v1, tint(rng, g.colours[GRASS]), GRASS)
        for v in np.arange(v0, v1, 13):
            if rng.random() < 0.5:
                g.tree(end - 2.5, float(v), g.between(4, 9))
        x = end
    _across(g, v0, v1)


def _beach(g: Ground, v0: float, v1: float) -> None:
    u, rng = g.half_u, g.rng
    g.rectangle(-u, v0 - 8, u, v1 + 8, tint(rng, g.colours[SAND]), SAND)
    for _ in g.times(1, 3):
        _crowd(g, g.between(-0.8, 0.8) * u, (v0 + v1) / 2, int(rng.integers(3, 10)), g.between(10, 24))
    for _ in g.times(0, 4):
        g.spot(BICYCLE, g.between(-u, u), g.between(v0 + 6, v1 - 6), g.between(0, 2 * math.pi))
    for _ in g.times(4, 12):
        towel = tint(rng, ((60, 60, 200), (200, 140, 60), (200, 200, 210), (80, 190, 220))[int(rng.integers(4))])
        at, v = g.between(-u, u), g.between(v0 + 5, v1 - 5)
        g.rectangle(at, v, at + 9, v + 4.5, towel)
    for _ in g.times(2, 9):
        at, v = g.between(-u, u), g.between(v0 + 6, v1 - 6)
        if rng.random() < 0.5:
            g.lump(at, v, g.between(4.5, 6.5), 0.0, tint(rng, _PARASOLS[int(rng.integers(4))]))
        else:
            g.lump(at, v, g.between(2, 4.5), 0.3, tint(rng, (120, 128, 132), 20))
    for _ in g.times(0, 3):
        g.spot(BOAT, g.between(-u, u), g.between(v0 + 8, v1 - 8), g.between(0, 2 * math.pi))


def _shore(g: Ground, v0: float, v1: float) -> None:
    """Water with an uneven edge and a line of foam on both sides."""
    u = g.half_u
    x = np.linspace(-u, u, 40)
    low, high = (v + np.cumsum(g.rng.uniform(-1, 1, 40)) * 1.6 for v in (v0, v1))
    outline = np.concatenate([np.stack([x, low], 1), np.stack([x, high], 1)[::-1]])
    g.fill(outline, g.colours[WATER], WATER)
    for edge in (low, high):
        points = np.rint(g.to_px(np.stack([x, edge], 1)) * (1 << SHIFT)).astype(np.int32)
        cv2.polylines(g.foam, [points], False, 150, max(1, round(3 * g.scale)), cv2.LINE_AA, SHIFT)


def _sea(g: Ground, v0: float, v1: float) -> None:
    u, rng = g.half_u, g.rng
    _shore(g, v0, v1)
    for _ in g.times(0, 5):
        g.lump(g.between(-u, u), g.between(v0 + 12, v1 - 12), g.between(1.3, 2), 0.0, (50, 120, 225))
    for _ in g.times(4, 11):
        moving = bool(rng.random() < 0.6)
        g.spot(BOAT, g.between(-u, u), g.between(v0 + 16, v1 - 16), g.between(0, 2 * math.pi), moving)


def _marina(g: Ground, v0: float, v1: float) -> None:
    u, rng = g.half_u, g.rng
    # Beyond v1, so that no strip of land is left before an uneven shore.
    g.rectangle(-u, v0, u, v1 + 30, g.colours[WATER], WATER)
    g.rectangle(-u, v0 - 3, u, v0 + 2, tint(rng, (170, 175, 178)), PAVING)
    wood, reach = g.colours[WOOD], (v1 - v0) * g.between(0.5, 0.75)
    occupied, step = g.between(0.15, 0.5), g.between(12.5, 17)
    for x in np.arange(-u + g.between(0, 40), u, g.between(84, 150)):
        g.rectangle(x - 3, v0, x + 3, v0 + reach, wood, WOOD)
        for v in np.arange(v0 + 14, v0 + reach - 6, step):
            for side, heading in ((-1, 0.0), (1, math.pi)):
                g.rectangle(x, v - step / 2 - 0.5, x + side * 13, v - step / 2 + 0.5, wood, WOOD)
                if rng.random() < occupied:
                    g.spot(BOAT, x + side * 16, float(v + rng.uniform(-1, 1)), heading + float(rng.normal(0, 0.06)))
        g.spot(PERSON, float(x), v0 + g.between(5, reach), 0.0)
    for _ in g.times(1, 4):
        g.spot(
            BOAT,
            g.between(-u, u),
            g.between(v0 + reach + 14, v1 - 6),
            float(rng.choice((0.0, math.pi)) + rng.uniform(-0.4, 0.4)),
            True,
        )


_PAINTERS: dict[Band, Callable[[Ground, float, float], None]] = {
    "road": _road, "parking": _parking, "houses": _houses, "square": _square, "park": _park,
    "field": _field, "beach": _beach, "marina": _marina, "sea": _sea,
}  # fmt: skip

"""Light, texture and camera of `sample-aerial`.

Pixel arithmetic is integer, so that the bytes, and with them the dataset's version, do not depend on threads or on the
processor's vector units.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from data.samples.aerial_ground import (
    ASPHALT,
    GRASS,
    LEAVES,
    PAVING,
    ROOF,
    SAND,
    SHIFT,
    SOIL,
    WATER,
    WOOD,
    Ground,
    Roof,
    Spot,
    Tree,
    tint,
)
from data.samples.aerial_objects import CLOTHES, HAIR, Colour, Layer, Points, Sprite

Image = npt.NDArray[np.uint8]

# Strength of blotches, grain and waves on each material, in 1/256 of its brightness.
_STRENGTHS = {
    GRASS: (56, 50, 0), SOIL: (40, 36, 0), ASPHALT: (34, 26, 0), PAVING: (26, 18, 0), SAND: (26, 20, 0),
    WATER: (44, 8, 62), WOOD: (20, 34, 0), ROOF: (26, 20, 0), LEAVES: (40, 120, 0),
}  # fmt: skip
_GREY_WEIGHTS = np.array([114, 587, 299], np.int64)
_CROWNS: tuple[Colour, ...] = ((40, 84, 56), (48, 98, 74), (38, 78, 68), (58, 106, 100))


def draw(image: Image, layers: list[Layer], scale_px: float, origin_px: Points) -> None:
    """Draw anti-aliased layers straight into the picture, at `scale_px` pixels a unit."""
    for layer in layers:
        points = [_fixed(layer.points * scale_px + origin_px)]
        if layer.stroke:
            cv2.polylines(image, points, False, layer.bgr, max(1, round(layer.stroke * scale_px)), cv2.LINE_AA, SHIFT)
        else:
            cv2.fillPoly(image, points, layer.bgr, cv2.LINE_AA, SHIFT)


def hull(points: Points) -> Points:
    """Convex hull (M, 2) of points (N, 2)."""
    return np.asarray(points[cv2.convexHull(points.astype(np.float32), returnPoints=False)[:, 0]])


def _fixed(points: Points) -> npt.NDArray[np.int32]:
    return np.rint(points * (1 << SHIFT)).astype(np.int32)


def static_shadows(ground: Ground, shadow_xy: Points) -> Image:
    """Shadows of roofs, crates and trees: 255 where the sun does not reach."""
    shade = np.zeros(ground.zone.shape, np.uint8)
    for corners, height in [(r.corners_px, r.height) for r in ground.roofs] + [
        (c.outline_px, 3.0) for c in ground.clutter
    ]:
        swept = np.concatenate([corners, corners + shadow_xy * height])
        cv2.fillPoly(shade, [_fixed(hull(swept))], 255, cv2.LINE_AA, SHIFT)
    for tree in ground.trees:
        x, y = _fixed(np.array([tree.x_px, tree.y_px]) + shadow_xy * tree.radius_px * 1.2).tolist()
        cv2.circle(shade, (x, y), int(tree.radius_px * (1 << SHIFT)), 255, -1, cv2.LINE_AA, SHIFT)
    return shade


def paint_ground(ground: Ground, shade: Image, depth: int) -> Image:
    """The canvas with its shadows, which take `depth`/255 of the light, blue sky light least."""
    lit = 255 - np.arange(256)[:, None] * np.array([depth * 13 // 16, depth, depth]) // 255
    light = cv2.LUT(cv2.merge([shade, shade, shade]), lit.astype(np.uint8)[None])
    return np.asarray((np.multiply(ground.canvas, light, dtype=np.uint16) + 127) // 255, np.uint8)


def wake(ground: Ground, spot: Spot, scale_px: float) -> None:
    """The foam behind a moving boat: two arms and the churned water between them."""
    for turn_rad, start, reach, strength, width in (
        (0.0, -1.6, 6.5, 90, 0.9),
        (0.2, 1.3, 7.5, 130, 0.35),
        (-0.2, 1.3, 7.5, 130, 0.35),
    ):
        ahead = np.array([math.cos(spot.heading_rad + turn_rad), math.sin(spot.heading_rad + turn_rad)]) * scale_px
        line = np.array([spot.x_px, spot.y_px]) + np.stack([ahead * start, ahead * (start - reach)])
        cv2.polylines(ground.foam, [_fixed(line)], False, strength, max(1, round(scale_px * width)), cv2.LINE_AA, SHIFT)


def finish_ground(ground: Ground, image: Image, sun_rad: float) -> Image:
    """Put foam, buildings, crates, crowns and unlabelled crowds on the ground, then the materials' texture on all."""
    water = cv2.dilate((ground.zone == WATER).astype(np.uint8), np.ones((3, 3), np.uint8))
    foam = cv2.GaussianBlur(ground.foam, (3, 3), 0.8) * water
    rows = np.flatnonzero(foam.any(axis=1))
    if len(rows):
        part, weight = image[rows[0] : rows[-1] + 1], foam[rows[0] : rows[-1] + 1, :, None].astype(np.int32)
        part[...] = (part * (255 - weight) + 235 * weight + 127) // 255
    for roof in ground.roofs:
        cv2.fillPoly(ground.zone, [_fixed(roof.corners_px)], ROOF, cv2.LINE_8, SHIFT)
        _roof(ground.rng, image, roof, sun_rad, ground.scale)
    for item in ground.clutter:
        cv2.fillPoly(image, [_fixed(item.outline_px)], item.bgr, cv2.LINE_AA, SHIFT)
        edge = tint(ground.rng, _darker(item.bgr, 0.75), 6)
        cv2.polylines(image, [_fixed(item.outline_px)], True, edge, 1, cv2.LINE_AA, SHIFT)
    for tree in ground.trees:
        _tree(ground, image, tree, sun_rad)
    for region in ground.ignore_px:
        _crowd(ground.rng, image, region)
    return _texture(ground, image)


def _darker(bgr: Colour, factor: float) -> Colour:
    return int(bgr[0] * factor), int(bgr[1] * factor), int(bgr[2] * factor)


def _roof(rng: np.random.Generator, image: Image, roof: Roof, sun_rad: float, scale: float) -> None:
    a, b, c, d = roof.corners_px
    dark = tint(rng, _darker(roof.bgr, 0.72), 4)
    cv2.fillPoly(image, [_fixed(roof.corners_px)], roof.bgr, cv2.LINE_AA, SHIFT)
    if roof.gabled:
        left, right = (a + d) / 2, (b + c) / 2
        averted = float((d - a) @ np.array([math.cos(sun_rad), math.sin(sun_rad)])) > 0
        half = np.array([left, right, c, d] if averted else [a, b, right, left])
        cv2.fillPoly(image, [_fixed(half)], dark, cv2.LINE_AA, SHIFT)
        tiles = tint(rng, _darker(roof.bgr, 0.85), 4)
        courses = [np.array([a + (d - a) * t, b + (c - b) * t]) for t in np.linspace(0.1, 0.9, 9).tolist() if t != 0.5]
        cv2.polylines(image, [_fixed(line) for line in courses], False, tiles, 1, cv2.LINE_AA, SHIFT)
        cv2.polylines(
            image, [_fixed(np.array([left, right]))], False, tint(rng, (180, 186, 190)), 1, cv2.LINE_AA, SHIFT
        )
    else:
        cv2.polylines(image, [_fixed(roof.corners_px)], True, dark, max(2, round(3 * scale)), cv2.LINE_AA, SHIFT)
    for _ in range(int(rng.integers(1, 6))):
        s, t, size = float(rng.uniform(0.12, 0.8)), float(rng.uniform(0.15, 0.75)), float(rng.uniform(0.05, 0.13))
        x, y = b - a, d - a
        corner = a + x * s + y * t
        vent = np.array([corner, corner + x * size, corner + x * size + y * size * 1.3, corner + y * size * 1.3])
        cv2.fillPoly(image, [_fixed(vent + 1.5)], (45, 45, 48), cv2.LINE_AA, SHIFT)
        metal = tint(rng, (175, 178, 180) if rng.random() < 0.7 else (110, 84, 60), 20)
        cv2.fillPoly(image, [_fixed(vent)], metal, cv2.LINE_AA, SHIFT)


def _tree(ground: Ground, image: Image, tree: Tree, sun_rad: float) -> None:
    """An uneven crown, dabbed lighter on the side of the sun."""
    rng, radius = ground.rng, tree.radius_px
    base = tint(rng, _CROWNS[int(rng.integers(len(_CROWNS)))], 9)
    angles = np.arange(14) * (math.pi / 7)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = _fixed(circle * (radius * rng.uniform(0.82, 1.16, 14))[:, None] + (tree.x_px, tree.y_px))
    cv2.fillPoly(image, [outline], _darker(base, 0.78), cv2.LINE_AA, SHIFT)
    cv2.fillPoly(ground.zone, [outline], LEAVES, cv2.LINE_8, SHIFT)
    num = min(30, 5 + int(radius * 1.6))
    around, far = rng.uniform(0, 2 * math.pi, num), np.sqrt(rng.uniform(0, 0.62, num))
    xs, ys = np.cos(around) * far, np.sin(around) * far
    light = 1.0 - 0.34 * (xs * math.cos(sun_rad) + ys * math.sin(sun_rad)) + rng.uniform(-0.12, 0.16, num)
    sizes = (rng.uniform(0.16, 0.34, num) * radius * (1 << SHIFT)).astype(np.int64) + 10
    centres = _fixed(np.stack([xs, ys], axis=1) * radius + (tree.x_px, tree.y_px))
    for centre, size, factor in zip(centres.tolist(), sizes.tolist(), light.tolist(), strict=True):
        cv2.circle(image, centre, size, _darker(base, factor), -1, cv2.LINE_AA, SHIFT)


def _crowd(rng: np.random.Generator, image: Image, region_px: tuple[int, int, int, int]) -> None:
    """People too small and too close to tell apart, well inside the region and thinning out towards its border."""
    x0, y0, x1, y1 = region_px
    num = (x1 - x0) * (y1 - y0) // 12
    xs, ys = (
        ((rng.random(num) + rng.random(num)) / 2 * (high - low - 6) + low + 3) for low, high in ((x0, x1), (y0, y1))
    )
    order = np.argsort(ys, kind="stable")
    shirts, hairs = rng.integers(0, len(CLOTHES), num).tolist(), rng.integers(0, len(HAIR), num).tolist()
    for (x, y), shirt, hair in zip(_fixed(np.stack([xs, ys], 1)[order]).tolist(), shirts, hairs, strict=True):
        muted = tint(rng, _darker(CLOTHES[shirt], 0.7), 20)
        cv2.circle(image, (x, y + 8), 18, (52, 50, 50), -1, cv2.LINE_AA, SHIFT)
        cv2.circle(image, (x, y), 16, muted, -1, cv2.LINE_AA, SHIFT)
        cv2.circle(image, (x, y - 16), 8, HAIR[hair], -1, cv2.LINE_AA, SHIFT)


def _noise(rng: np.random.Generator, size_px: int, cells_y: int, cells_x: int) -> npt.NDArray[np.int32]:
    """Smooth noise (size, size) in -128..127."""
    grid = rng.integers(0, 256, (cells_y, cells_x), dtype=np.uint8)
    return np.asarray(cv2.resize(grid, (size_px, size_px), interpolation=cv2.INTER_LINEAR_EXACT), np.int32) - 128


def _waves(rng: np.random.Generator, size_px: int) -> npt.NDArray[np.int32]:
    """Noise (size, size) in -128..127 drawn out along one direction, whatever that direction is."""
    side = size_px * 3 // 2
    table = (
        _noise(rng, side, side // 4, side // 14)
        + _noise(rng, side, side // 2, side // 6)
        + _noise(rng, side, side // 11, side // 40)
    ) // 2
    heading_rad = float(rng.uniform(0, math.pi))
    c, s = round(math.cos(heading_rad) * 1024), round(math.sin(heading_rad) * 1024)
    along = np.arange(size_px) - size_px // 2
    u = (along[None, :] * c + along[:, None] * s >> 10) + side // 2
    v = (along[:, None] * c - along[None, :] * s >> 10) + side // 2
    return np.asarray(table[v, u])


def _texture(ground: Ground, image: Image) -> Image:
    """Each material under its blotches, grain and waves; vegetation changes its hue with them."""
    rng, size = ground.rng, ground.size_px
    blotches = (
        _noise(rng, size, 4, 4) + _noise(rng, size, 9, 9) + _noise(rng, size, 23, 23) + _noise(rng, size, 61, 61)
    ) // 2
    grain = (rng.integers(-128, 128, (size, size), dtype=np.int8) + 2 * _noise(rng, size, size // 2, size // 2)) // 2
    strengths = np.array([_STRENGTHS[material] for material in range(len(_STRENGTHS))], np.int32).T
    total = strengths[0].take(ground.zone) * blotches + strengths[1].take(ground.zone) * grain
    if (ground.zone == WATER).any():
        total += strengths[2].take(ground.zone) * _waves(rng, size)
    weights = np.array([100, 128, 140], np.int32)
    return np.asarray(np.clip(image * ((total[..., None] * weights >> 7) + 32768) >> 15, 0, 255), np.uint8)


def lay_over(rng: np.random.Generator, image: Image, sprite: Sprite, low_contrast: bool) -> None:
    """Lay a sprite over the picture; one of low contrast is first moved to the grey level of the pixels around it."""
    window = sprite.window
    alpha = sprite.alpha.astype(np.int32)[..., None]
    drawn = sprite.premultiplied_bgr.astype(np.int32)
    below = image[window].astype(np.int32)
    if low_contrast:
        clear = 255 - alpha
        ground_grey = int((below * clear).sum(axis=(0, 1)) @ _GREY_WEIGHTS) // (1000 * max(1, int(clear.sum())))
        own_grey = int(drawn.sum(axis=(0, 1)) @ _GREY_WEIGHTS) * 255 // (1000 * int(alpha.sum()))
        move = ground_grey - own_grey + int(rng.integers(-12, 13))
        drawn = np.clip(drawn + move * alpha // 255, 0, alpha)
    image[window] = (drawn * 255 + below * (255 - alpha) + 127) // 255


def photograph(rng: np.random.Generator, image: Image) -> Image:
    """The picture as this flight's camera takes it: softness, exposure, colour cast, haze and sensor noise."""
    if rng.random() < 0.6:
        image = np.asarray(cv2.GaussianBlur(image, (3, 3), float(rng.uniform(0.3, 0.65))), np.uint8)
    gain, haze = int(rng.integers(225, 320)), int(rng.integers(-6, 30))
    levels = np.arange(256)[:, None] * (gain + rng.integers(-14, 15, 3)) // 256 + haze
    exposed = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8)[None])
    noise = rng.integers(-128, 128, image.shape, dtype=np.int8).astype(np.int16) + rng.integers(
        -128, 128, image.shape, dtype=np.int8
    )
    return np.asarray(np.clip(exposed + (noise * int(rng.integers(2, 14)) >> 8), 0, 255), np.uint8)

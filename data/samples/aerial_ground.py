"""The ground of `sample-aerial` while it is laid out: a canvas, its materials, and what is to stand on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from data.samples.aerial_objects import Colour, Points, polygon

GRASS, SOIL, ASPHALT, PAVING, SAND, WATER, WOOD, ROOF, LEAVES = range(9)
SHIFT = 4


@dataclass(frozen=True)
class Spot:
    """A place where an object may stand: centre in image pixels, heading in image axes."""

    label: int
    x_px: float
    y_px: float
    heading_rad: float
    moving: bool = False


@dataclass(frozen=True)
class Roof:
    """A building: corners (4, 2) in pixels in the order of its outline, the ridge parallel to its first side."""

    corners_px: Points
    height: float
    bgr: Colour
    gabled: bool


@dataclass(frozen=True)
class Tree:
    """A crown, or a bush where the radius is small."""

    x_px: float
    y_px: float
    radius_px: float


@dataclass(frozen=True)
class Clutter:
    """A crate, rock, parasol, container or buoy, which is no object: its outline (N, 2) in pixels."""

    outline_px: Points
    bgr: Colour


@dataclass
class Ground:
    """The picture while it is being laid out.

    Places are given in a frame (u, v) that is turned and scaled against the picture: bands run along u and are stacked
    along v, both in units of one pixel at the lowest flight height; a unit is `scale` pixels. `zone` (H, W) is the
    material of every pixel, `foam` (H, W) how white the water is; a street crosses the land bands at `cross_u`.
    """

    rng: np.random.Generator
    size_px: int
    scale: float
    angle_rad: float
    origin_v: float
    cross_u: float
    canvas: npt.NDArray[np.uint8]
    zone: npt.NDArray[np.uint8]
    foam: npt.NDArray[np.uint8]
    colours: dict[int, Colour]
    spots: list[Spot] = field(default_factory=list)
    roofs: list[Roof] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    clutter: list[Clutter] = field(default_factory=list)
    ignore_px: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def half_u(self) -> float:
        """Half the length of a band that reaches through the whole picture."""
        return self.size_px * 0.72 / self.scale

    def between(self, low: float, high: float) -> float:
        """A random number."""
        return float(self.rng.uniform(low, high))

    def times(self, low: int, high: int) -> range:
        """A loop over a random number of rounds, at least `low` and below `high`."""
        return range(int(self.rng.integers(low, high)))

    def to_px(self, uv: Points) -> Points:
        """Points (N, 2) from band units to pixels."""
        c, s = math.cos(self.angle_rad) * self.scale, math.sin(self.angle_rad) * self.scale
        return np.asarray((uv - np.array([0.0, self.origin_v])) @ np.array([[c, s], [-s, c]]) + self.size_px / 2)

    def fill(self, uv: Points, bgr: Colour, material: int | None = None) -> None:
        """Paint a polygon, and change the material under it."""
        points = np.rint(self.to_px(uv) * (1 << SHIFT)).astype(np.int32)
        cv2.fillPoly(self.canvas, [points], bgr, cv2.LINE_AA, SHIFT)
        if material is not None:
            cv2.fillPoly(self.zone, [points], material, cv2.LINE_8, SHIFT)

    def rectangle(self, u0: float, v0: float, u1: float, v1: float, bgr: Colour, material: int | None = None) -> None:
        """`fill` of a rectangle along the bands."""
        self.fill(polygon(u0, v0, u1, v0, u1, v1, u0, v1), bgr, material)

    def spot(self, label: int, u: float, v: float, heading_rad: float, moving: bool = False) -> None:
        """Note a place for an object; the heading is in band axes."""
        x, y = self.to_px(np.array([[u, v]]))[0]
        margin = 12
        if -margin < x < self.size_px + margin and -margin < y < self.size_px + margin:
            self.spots.append(Spot(label, float(x), float(y), heading_rad + self.angle_rad, moving))

    def tree(self, u: float, v: float, radius: float) -> None:
        """Plant a crown unless its trunk would stand outside the picture or on a road."""
        x, y = self.to_px(np.array([[u, v]]))[0]
        limit = self.size_px - 1
        if self.zone[int(min(max(y, 0), limit)), int(min(max(x, 0), limit))] not in (ASPHALT, WATER):
            self.trees.append(Tree(float(x), float(y), radius * self.scale))

    def crate(self, u: float, v: float, length: float, width: float, bgr: Colour) -> None:
        """Put down a box along the bands."""
        corners = polygon(u, v, u + length, v, u + length, v + width, u, v + width)
        self.clutter.append(Clutter(self.to_px(corners), bgr))

    def lump(self, u: float, v: float, radius: float, unevenness: float, bgr: Colour) -> None:
        """Put down something round: a rock, or with no unevenness a parasol, a manhole or a buoy."""
        angles = np.arange(8) * (math.pi / 4)
        radii = radius * self.rng.uniform(1 - unevenness, 1 + unevenness, 8)
        outline = np.stack([u + np.cos(angles) * radii, v + np.sin(angles) * radii], axis=1)
        self.clutter.append(Clutter(self.to_px(outline), bgr))


def tint(rng: np.random.Generator, bgr: Colour, spread: int = 10) -> Colour:
    """`bgr` moved at random, mostly in brightness."""
    common = int(rng.integers(-spread, spread + 1))
    own = rng.integers(-spread // 3, spread // 3 + 1, 3)
    b, g, r = (min(255, max(0, channel + common + int(o))) for channel, o in zip(bgr, own, strict=True))
    return b, g, r

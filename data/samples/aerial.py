"""`sample-aerial`: procedural drone pictures with small vehicles, people, boats and bicycles.

A picture follows from (seed, split, index) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from data.samples import aerial_objects as objects
from data.samples import aerial_paint as paint
from data.samples.aerial_bands import lay_out
from data.samples.aerial_ground import GRASS, PAVING, SAND, WATER, Ground, Spot
from data.samples.aerial_objects import BICYCLE, BOAT, PERSON, VEHICLE, Layer, Points, Sprite
from data.samples.scene import Recipe, Scene, picture_rng

MIN_LONG_SIDE_PX, MAX_LONG_SIDE_PX = 4.0, 24.0
MIN_VISIBLE_SHARE = 0.5
# At the lowest flight height. People and bicycles are larger than life beside the vehicles, or they would be specks.
LONG_SIDES_PX = {VEHICLE: (20.0, 23.5), PERSON: (13.0, 17.0), BOAT: (19.0, 23.5), BICYCLE: (16.0, 21.0)}
# Of the flat drawings, in their own unit.
HEIGHTS = {VEHICLE: 1.3, BOAT: 0.7}
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class _Placed:
    spot: Spot
    layers: list[Layer]
    axes: Points
    sprite: Sprite


def render(recipe: Recipe, split: str, index: int) -> Scene:
    """Picture number `index` of a split. Raises ValueError for an unknown split, IndexError for an index outside it."""
    return render_with_instances(recipe, split, index)[0]


def render_with_instances(recipe: Recipe, split: str, index: int) -> tuple[Scene, npt.NDArray[np.int32]]:
    """`render`, and which object each pixel (H, W) shows, as 1 + its row in the labels; 0 where there is none."""
    rng = picture_rng(recipe, split, index)
    scale = float(rng.uniform(0.85, 1.0) if rng.random() < 0.9 else rng.uniform(0.35, 0.85))
    ground = lay_out(rng, recipe.image_size_px, scale)
    sun_rad, shadow_length = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.3, 0.9))
    shadow_xy = np.array([math.cos(sun_rad), math.sin(sun_rad)]) * shadow_length
    blocked = _blocked(ground)
    _ignore_regions(ground, blocked)
    placed = _place(ground, blocked)

    shade = paint.static_shadows(ground, shadow_xy)
    for item in placed:
        _cast_shadow(shade, item, shadow_xy)
    image = paint.paint_ground(ground, shade, int(rng.integers(70, 150)))
    for item in placed:
        if item.spot.moving and item.spot.label == BOAT:
            paint.wake(ground, item.spot, item.sprite.scale_px)
    image = paint.finish_ground(ground, image, sun_rad)
    instances = np.zeros(image.shape[:2], np.int32)
    for row, item in enumerate(placed):
        low_contrast = bool(rng.random() < recipe.low_contrast_share)
        paint.lay_over(rng, image, item.sprite, low_contrast)
        instances[item.sprite.window][item.sprite.alpha > 96] = row + 1
    scene = Scene(
        image_bgr=paint.photograph(rng, image),
        boxes_xyxy_px=np.array([item.sprite.box_xyxy_px for item in placed], np.float32).reshape(-1, 4),
        labels=np.array([item.spot.label for item in placed], np.int64),
        ignore_xyxy_px=np.array(ground.ignore_px, np.float32).reshape(-1, 4),
    )
    return scene, instances


def _blocked(ground: Ground) -> npt.NDArray[np.uint8]:
    """255 where no object may stand: roofs, crowns, clutter."""
    blocked = np.zeros((ground.size_px, ground.size_px), np.uint8)
    for roof in ground.roofs:
        cv2.fillPoly(blocked, [np.rint(roof.corners_px).astype(np.int32)], 255)
    for tree in ground.trees:
        cv2.circle(blocked, (round(tree.x_px), round(tree.y_px)), math.ceil(tree.radius_px * 1.2) + 1, 255, -1)
    for item in ground.clutter:
        cv2.fillPoly(blocked, [np.rint(item.outline_px).astype(np.int32)], 255)
    return cv2.dilate(blocked, np.ones((3, 3), np.uint8)).astype(np.uint8)


def _ignore_regions(ground: Ground, blocked: npt.NDArray[np.uint8]) -> None:
    """Now and then a place too dense to label: no object is put there, and its content is painted as a crowd."""
    rng = ground.rng
    if rng.random() < 0.7:
        return
    for _ in range(6):
        w, h = (int(side) for side in rng.integers(26, 58, 2))
        x, y = int(rng.integers(0, ground.size_px - w)), int(rng.integers(0, ground.size_px - h))
        window = (slice(y, y + h), slice(x, x + w))
        if not blocked[window].any() and np.isin(ground.zone[window], (GRASS, PAVING, SAND)).all():
            ground.ignore_px.append((x, y, x + w, y + h))
            blocked[window] = 255


def _place(ground: Ground, blocked: npt.NDArray[np.uint8]) -> list[_Placed]:
    """Put an object on every spot where a whole one fits, in random order; `blocked` grows by each."""
    rng, limit = ground.rng, ground.size_px - 1
    up = np.array([float(rng.uniform(-0.12, 0.12)), -float(rng.uniform(0.7, 0.95))])
    placed = []
    for position in rng.permutation(len(ground.spots)).tolist():
        spot = ground.spots[position]
        pixel = min(max(round(spot.y_px), 0), limit), min(max(round(spot.x_px), 0), limit)
        if blocked[pixel] or (ground.zone[pixel] == WATER and spot.label != BOAT):
            continue
        layers, axes = _drawing(rng, spot, up)
        long_side_px = max(MIN_LONG_SIDE_PX + 0.5, float(rng.uniform(*LONG_SIDES_PX[spot.label])) * ground.scale)
        sprite = objects.rasterise(layers, axes, long_side_px, (spot.x_px, spot.y_px), ground.size_px)
        if sprite is None or sprite.visible_share < MIN_VISIBLE_SHARE:
            continue
        x0, y0, x1, y1 = sprite.box_xyxy_px
        if not MIN_LONG_SIDE_PX <= max(x1 - x0, y1 - y0) <= MAX_LONG_SIDE_PX:
            continue
        region = blocked[sprite.window]
        if (region[sprite.alpha > 0] > 0).any():
            continue
        region[cv2.dilate(sprite.alpha, np.ones((3, 3), np.uint8)) > 0] = 255
        placed.append(_Placed(spot, layers, axes, sprite))
    return placed


def _drawing(rng: np.random.Generator, spot: Spot, up: Points) -> tuple[list[Layer], Points]:
    """An object's layers and their axes in the picture."""
    if spot.label == VEHICLE:
        return objects.vehicle(rng), objects.turn(spot.heading_rad)
    if spot.label == BOAT:
        return objects.boat(rng), objects.turn(spot.heading_rad)
    if spot.label == PERSON:
        return objects.person(rng), np.array([[1.0, 0.0], up])
    # Never end on: a bicycle seen from behind is a line.
    side = 1.0 if math.cos(spot.heading_rad) > 0 else -1.0
    along = 0.55 * math.sin(spot.heading_rad)
    return objects.bicycle(rng), np.array([[side * math.cos(along), math.sin(along)], up])


def _cast_shadow(shade: npt.NDArray[np.uint8], item: _Placed, shadow_xy: Points) -> None:
    """Draw an object's shadow: an upright drawing laid on the ground, or the path of a flat one's outline."""
    if item.spot.label in HEIGHTS:
        outline = item.layers[0].points @ item.axes
        swept = np.concatenate([outline, outline + shadow_xy * HEIGHTS[item.spot.label]])
        layers = [Layer(paint.hull(swept), WHITE)]
    else:
        axes = np.array([item.axes[0], shadow_xy])
        layers = [Layer(layer.points @ axes, WHITE, layer.stroke) for layer in item.layers]
    paint.draw(shade, layers, item.sprite.scale_px, item.sprite.origin_px)

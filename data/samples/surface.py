"""`sample-surface`: procedural pictures of metal surfaces with scratches, pits, inclusions and stains.

A picture follows from (seed, split, index) alone.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from data.samples import surface_texture as texture
from data.samples.scene import Recipe, Scene, picture_rng
from data.samples.surface_defects import LONG_SIDES_PX, Defect, defect, lay_over

# Every sixth picture shows a flawless surface, so that each split has its share of them.
FLAWLESS_PERIOD = 6
MIN_DEFECTS, MAX_DEFECTS = 8, 26
# Between two boxes.
GAP_PX = 4


def render(recipe: Recipe, split: str, index: int) -> Scene:
    """Picture number `index` of a split. Raises ValueError for an unknown split, IndexError for an index outside it."""
    return render_with_instances(recipe, split, index)[0]


def render_with_instances(recipe: Recipe, split: str, index: int) -> tuple[Scene, npt.NDArray[np.int32]]:
    """`render`, and which defect each pixel (H, W) shows, as 1 + its row in the labels; 0 where there is none."""
    rng, size = picture_rng(recipe, split, index), recipe.image_size_px
    plate = texture.plate(rng, size)
    image, instances = plate.image_bgr.copy(), np.zeros((size, size), np.int32)
    labels, boxes = [], []
    num = 0 if index % FLAWLESS_PERIOD == FLAWLESS_PERIOD - 1 else int(rng.integers(MIN_DEFECTS, MAX_DEFECTS + 1))
    taken = np.zeros((size, size), np.uint8)
    for _ in range(num):
        item = defect(rng, int(rng.integers(len(LONG_SIDES_PX))), plate, bool(rng.random() < recipe.low_contrast_share))
        place = _place(rng, item, taken)
        if place is None:
            continue
        left, top = place
        lay_over(image, item, left, top)
        height, width = item.cover.shape
        labels.append(item.label)
        boxes.append(np.add(item.box_xyxy_px, (left, top, left, top)))
        instances[top : top + height, left : left + width][item.cover > 96] = len(labels)
    scene = Scene(
        image_bgr=texture.photograph(rng, image),
        boxes_xyxy_px=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        ignore_xyxy_px=np.zeros((0, 4), np.float32),
    )
    return scene, instances


def _place(rng: np.random.Generator, item: Defect, taken: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    """A free (left, top) for the drawing's patch, wholly inside; `taken` grows by it. None when none was found."""
    height, width = item.cover.shape
    for _ in range(20):
        left, top = int(rng.integers(0, taken.shape[1] - width + 1)), int(rng.integers(0, taken.shape[0] - height + 1))
        if not taken[top : top + height, left : left + width].any():
            cv2.rectangle(taken, (left - GAP_PX, top - GAP_PX), (left + width, top + height), 255, -1)
            return left, top
    return None

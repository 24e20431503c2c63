"""`split_statistics`: one split of a dataset in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.records import XYWH, ImageRecord

# Upper limits of sqrt(area), exclusive. AI-TOD's begin at 2 px and end at 64; what lies outside is counted as well.
AITOD_SIDES_PX = {"below 2": 2.0, "very tiny": 8.0, "tiny": 16.0, "small": 32.0, "medium": 64.0, "large": np.inf}
COCO_SIDES_PX = {"small": 32.0, "medium": 96.0, "large": np.inf}
# Half octaves; the first bin begins at 0 and the last has no end.
SIDE_EDGES_PX = tuple(round(2 ** (step / 2), 2) for step in range(1, 19))
CENTRE_CELLS = 16


@dataclass(frozen=True)
class SplitStatistics:
    """One split in numbers. Objects are boxes that are not crowd boxes; sizes are in pixels of the picture as stored.

    `sides`: objects by sqrt(area) between SIDE_EDGES_PX; `objects_per_image`: p50, p99 and max; `images_by_objects`:
    images by their number of objects; `centres`: objects by place, CENTRE_CELLS rows from the top, over the relative
    width and height; `ignored_area_share`: of all pixels, those in the union of ignore regions and crowd boxes.
    """

    num_images: int
    num_images_without_objects: int
    num_objects: int
    num_crowd_boxes: int
    num_boxes_clipped: int
    num_boxes_excluded: int
    num_images_excluded: int
    objects_per_class: dict[str, int]
    images_per_class: dict[str, int]
    objects_by_aitod_size: dict[str, int]
    objects_by_coco_size: dict[str, int]
    sides: list[int]
    objects_per_image: dict[str, int]
    images_by_objects: dict[int, int]
    centres: list[list[int]]
    num_ignore_regions: int
    num_images_with_ignored: int
    ignored_area_share: float
    image_sizes: dict[str, int]
    tiling: dict[str, Any] | None


def union_area_px(regions_xywh_px: Sequence[XYWH]) -> float:
    """Area of the union of boxes, exact: their edges cut the plane into cells that are wholly inside or outside."""
    if not regions_xywh_px:
        return 0.0
    x, y, w, h = np.array(regions_xywh_px, np.float64).T
    x_edges, y_edges = np.unique([x, x + w]), np.unique([y, y + h])
    spans_x = (x[:, None] <= x_edges[:-1]) & (x_edges[1:] <= (x + w)[:, None])
    spans_y = (y[:, None] <= y_edges[:-1]) & (y_edges[1:] <= (y + h)[:, None])
    inside = (spans_x[:, :, None] & spans_y[:, None, :]).any(axis=0)
    return float(np.diff(x_edges) @ inside @ np.diff(y_edges))


def split_statistics(records: Sequence[ImageRecord], classes: Sequence[str], info: dict[str, Any]) -> SplitStatistics:
    """Count the records of a split, of which there is at least one; `info` is that of its annotation file."""
    objects = [(record, box) for record in records for box in record.boxes if not box.is_crowd]
    num_objects = np.array([sum(not box.is_crowd for box in record.boxes) for record in records])
    ignored = [(*record.ignore_xywh_px, *_crowd(record)) for record in records]
    ignored_px = sum(union_area_px(regions) for regions in ignored)
    sides_px = np.sqrt([box.area_px for _, box in objects])
    labels = Counter(box.label for _, box in objects)
    images = Counter(label for record in records for label in {box.label for box in record.boxes if not box.is_crowd})
    sizes = Counter(f"{record.width_px}x{record.height_px}" for record in records)
    return SplitStatistics(
        num_images=len(records),
        num_images_without_objects=int((num_objects == 0).sum()),
        num_objects=len(objects),
        num_crowd_boxes=sum(box.is_crowd for record in records for box in record.boxes),
        num_boxes_clipped=info["num_boxes_clipped"],
        num_boxes_excluded=info["num_boxes_excluded"],
        num_images_excluded=info.get("num_images_excluded", 0),
        objects_per_class={name: labels[label] for label, name in enumerate(classes)},
        images_per_class={name: images[label] for label, name in enumerate(classes)},
        objects_by_aitod_size=_by_size(sides_px, AITOD_SIDES_PX),
        objects_by_coco_size=_by_size(sides_px, COCO_SIDES_PX),
        sides=np.histogram(sides_px, (0, *SIDE_EDGES_PX, np.inf))[0].tolist(),
        objects_per_image={
            "p50": int(np.quantile(num_objects, 0.5, method="inverted_cdf")),
            "p99": int(np.quantile(num_objects, 0.99, method="inverted_cdf")),
            "max": int(num_objects.max()),
        },
        images_by_objects=dict(sorted(Counter(num_objects.tolist()).items())),
        centres=_centres([(record, box.box_xywh_px) for record, box in objects]),
        num_ignore_regions=sum(len(record.ignore_xywh_px) for record in records),
        num_images_with_ignored=sum(bool(regions) for regions in ignored),
        ignored_area_share=round(ignored_px / sum(record.width_px * record.height_px for record in records), 6),
        image_sizes=dict(sizes.most_common()),
        tiling=info.get("tiling"),
    )


def _crowd(record: ImageRecord) -> list[XYWH]:
    return [box.box_xywh_px for box in record.boxes if box.is_crowd]


def _by_size(sides_px: NDArray[np.float64], limits_px: dict[str, float]) -> dict[str, int]:
    buckets = np.searchsorted(list(limits_px.values()), sides_px, side="right")
    return {name: int((buckets == number).sum()) for number, name in enumerate(limits_px)}


def _centres(objects: Sequence[tuple[ImageRecord, XYWH]]) -> list[list[int]]:
    x = [(box[0] + box[2] / 2) / record.width_px for record, box in objects]
    y = [(box[1] + box[3] / 2) / record.height_px for record, box in objects]
    counts, _, _ = np.histogram2d(y, x, bins=CENTRE_CELLS, range=((0, 1), (0, 1)))
    cells: list[list[int]] = counts.astype(int).tolist()
    return cells

"""Ground truth and detections as columns: what every protocol and every analysis works on.

Legend: I images, C classes, G ground truths, N detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.checks import check_detections, check_ground_truth

Rows = NDArray[np.bool_] | NDArray[np.int64]


class TruthTable(NamedTuple):
    """Annotations. `image` (G,) and `label` (G,) index the images and classes of `Tables`; `boxes_xywh_px` (G, 4)."""

    image: NDArray[np.int64]
    label: NDArray[np.int64]
    boxes_xywh_px: NDArray[np.float64]
    areas_px: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]

    def take(self, rows: Rows) -> TruthTable:
        """The rows that a mask or an index array names."""
        return TruthTable(
            self.image[rows], self.label[rows], self.boxes_xywh_px[rows], self.areas_px[rows], self.is_crowd[rows]
        )


class DetectionTable(NamedTuple):
    """Detections. `image` (N,) and `label` (N,) as in `TruthTable`; `boxes_xywh_px` (N, 4); `scores` (N,)."""

    image: NDArray[np.int64]
    label: NDArray[np.int64]
    boxes_xywh_px: NDArray[np.float64]
    scores: NDArray[np.float64]

    def take(self, rows: Rows) -> DetectionTable:
        """The rows that a mask or an index array names."""
        return DetectionTable(self.image[rows], self.label[rows], self.boxes_xywh_px[rows], self.scores[rows])

    @property
    def areas_px(self) -> NDArray[np.float64]:
        """Areas of the boxes (N,)."""
        areas: NDArray[np.float64] = self.boxes_xywh_px[:, 2] * self.boxes_xywh_px[:, 3]
        return areas


class Tables(NamedTuple):
    """One split's ground truth and what was detected on it, in the order of the files they come from.

    Images and classes are numbered by ascending id, as pycocotools goes through them. `image_ids` (I,);
    `file_names` where they are known, else ""; `image_sizes_px` (I, 2) as width and height, 0 where unknown;
    `ignore_regions_xywh_px`: (R, 4) for each image; `class_ids` (C,).
    """

    truths: TruthTable
    detections: DetectionTable
    image_ids: NDArray[np.int64]
    file_names: tuple[str, ...]
    image_sizes_px: NDArray[np.int64]
    ignore_regions_xywh_px: tuple[NDArray[np.float64], ...]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]


def tabulate(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> Tables:
    """A COCO dict, whose images may carry `ignore_regions_xywh`, and COCO results as columns.

    An annotation's `area` counts where it has one, else the area of its box.

    Raises:
        BadGroundTruth, BadDetections: see `evaluation.checks`.
    """
    images = sorted(ground_truth["images"], key=lambda image: image["id"])
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    annotations = ground_truth["annotations"]
    check_ground_truth(ground_truth)
    check_detections(detections, ground_truth)
    image_ids = np.array([image["id"] for image in images], np.int64)
    class_ids = np.array([category["id"] for category in categories], np.int64)
    boxes_xywh_px = _boxes(annotations)
    areas_px = boxes_xywh_px[:, 2] * boxes_xywh_px[:, 3]
    return Tables(
        TruthTable(
            _places(annotations, "image_id", image_ids),
            _places(annotations, "category_id", class_ids),
            boxes_xywh_px,
            np.array([a.get("area", area) for a, area in zip(annotations, areas_px, strict=True)], np.float64),
            np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool),
        ),
        DetectionTable(
            _places(detections, "image_id", image_ids),
            _places(detections, "category_id", class_ids),
            _boxes(detections),
            np.array([d["score"] for d in detections], np.float64),
        ),
        image_ids,
        tuple(str(image.get("file_name", "")) for image in images),
        np.array([[image.get("width", 0), image.get("height", 0)] for image in images], np.int64).reshape(-1, 2),
        tuple(np.array(image.get("ignore_regions_xywh") or [], np.float64).reshape(-1, 4) for image in images),
        class_ids,
        tuple(category["name"] for category in categories),
    )


def rows_by_image(table: TruthTable | DetectionTable, num_images: int) -> list[NDArray[np.int64]]:
    """Rows of each image, in their order."""
    order = np.argsort(table.image, kind="stable")
    # Of no image NumPy would make one part, too.
    return np.split(order, np.searchsorted(table.image[order], np.arange(1, num_images)))[:num_images]


def _boxes(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)


def _places(rows: Sequence[Mapping[str, Any]], key: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(ids, np.array([row[key] for row in rows], np.int64)).astype(np.int64)

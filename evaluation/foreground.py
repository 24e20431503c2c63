"""Foreground against class score of every object: which of the two loses those that are missed.

A detector's score for a class is p(F) p(C | F), the foreground score times the class score (Eq. (1), "Unmasking the
Tiny: Foreground Probing for Small Object Detection"). The paper's Figure 1 shows missed objects whose class score
remains strong; here they are counted, for any architecture.

Shapes: A anchor points, G objects of one picture or tile, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Batch
from data.statistics import AITOD_SIDES_PX, COCO_SIDES_PX
from data.tiled_pictures import PictureTile
from evaluation.ignore import IgnoreRule
from evaluation.matching import match
from models.boxes import points_in_boxes
from models.interface import Detector

Outcome = Literal["missed", "found"]

# The paper calls scores strong, weak or suppressed and gives no number.
STRONG_SCORE = 0.5
MAX_POINTS = 5000
# Objects at a time, so that a dense picture with many anchor points does not fill the memory.
_BLOCK = 64


class ObjectScore(NamedTuple):
    """Foreground score and own class's score, both 0..1, at the anchor point that speaks best for an annotation."""

    annotation_id: int
    foreground: float
    class_score: float


class ForegroundObserver:
    """Collects in `rows` an `ObjectScore` for each object of the pictures that a detector looks at.

    Pass it to `evaluation.detector.detect`. Objects are the annotations of the COCO dict `ground_truth`
    but crowd boxes; not the boxes of a batch, for the loader leaves out those that its input makes too small, and tiles
    carry none. With `tiles`, as in `TiledPictures`, an object has a row for each tile that shows any of it.

    The anchor points asked are those inside the box; inside one cell of the finest level around its centre, where the
    box is narrower or lower than that. The nearest of all would not do, for it may be one of a coarse level, which
    small objects are hardly assigned to. The one with the highest product counts. A score that is not a number counts
    as 0: it never makes a detection.
    """

    def __init__(
        self, detector: Detector, ground_truth: Mapping[str, Any], tiles: Sequence[PictureTile] | None = None
    ) -> None:
        self.rows: list[ObjectScore] = []
        self._detector = detector
        self._tiles = tiles
        self._label = {category["id"]: label for label, category in enumerate(ground_truth["categories"])}
        self._annotations: dict[int, list[Mapping[str, Any]]] = {}
        for annotation in ground_truth["annotations"]:
            if not annotation.get("iscrowd", 0):
                self._annotations.setdefault(annotation["image_id"], []).append(annotation)

    def __call__(self, predictions: Any, batch: Batch) -> None:
        """Add the objects of one batch."""
        scores = self._detector.anchor_scores(predictions)
        device = scores.foreground.device
        for index, (frame_id, scale) in enumerate(zip(batch.image_ids, batch.scales.tolist(), strict=True)):
            annotations, boxes_xyxy_px = self._shown(frame_id, *batch.original_hw[index])
            labels = [self._label[annotation["category_id"]] for annotation in annotations]
            best = best_scores(
                scores.centres_xy_px,
                scores.foreground[index],
                scores.class_given_foreground[index],
                torch.from_numpy(boxes_xyxy_px * scale).to(device, torch.float32),
                torch.tensor(labels, dtype=torch.int64, device=device),
                finest_stride_px=min(self._detector.strides),
            )
            self.rows += [
                ObjectScore(annotation["id"], *pair)
                for annotation, pair in zip(annotations, best.tolist(), strict=True)
            ]

    def _shown(
        self, frame_id: int, height_px: int, width_px: int
    ) -> tuple[list[Mapping[str, Any]], NDArray[np.float64]]:
        """Objects of which a picture or tile shows any, and what it shows: (G, 4) in its own pixels."""
        image_id, x_px, y_px = frame_id, 0, 0
        if self._tiles is not None:
            image_id, (x_px, y_px, *_) = self._tiles[frame_id]
        annotations = self._annotations.get(image_id, [])
        boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) - [x_px, y_px, x_px, y_px]
        corners = corners.clip(0, [width_px, height_px, width_px, height_px])
        shown = np.flatnonzero((corners[:, 2:] > corners[:, :2]).all(axis=1))
        return [annotations[row] for row in shown.tolist()], corners[shown]


def best_scores(
    centres_xy_px: Tensor,
    foreground: Tensor,
    classes: Tensor,
    boxes_xyxy_px: Tensor,
    labels: Tensor,
    *,
    finest_stride_px: int,
) -> Tensor:
    """Return foreground and own class's score (G, 2) at each object's best anchor point; see `ForegroundObserver`.

    `centres_xy_px` (A, 2), `foreground` (A,) and `classes` (A, C) of one image; `boxes_xyxy_px` (G, 4) in the same
    frame; `labels` int64 (G,). Of equally good anchor points the first counts.
    """
    half_sizes_px = (boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]) / 2
    middles_px = boxes_xyxy_px[:, :2] + half_sizes_px
    # A little more than half a cell: a box whose middle lies on the border of cells asks them all.
    half_sizes_px = half_sizes_px.clamp(min=0.501 * finest_stride_px)
    asked = torch.cat((middles_px - half_sizes_px, middles_px + half_sizes_px), dim=1)
    rows = []
    for boxes, own in zip(asked.split(_BLOCK), labels.split(_BLOCK), strict=True):
        # One row per object and point that it asks.
        asking, point = points_in_boxes(centres_xy_px, boxes).nonzero(as_tuple=True)
        pairs = torch.stack((foreground[point], classes[point, own[asking]]), dim=1).nan_to_num(0)
        products = pairs.prod(1)
        highest = products.new_zeros(len(own)).scatter_reduce(0, asking, products, "amax")
        best = (products == highest[asking]).nonzero().squeeze(1)
        first = best.new_full((len(own),), len(point)).scatter_reduce(0, asking[best], best, "amin")
        rows.append(pairs[first])
    return torch.cat(rows)


@dataclass(frozen=True)
class ScoreGroup:
    """Some objects: how many, shares by quadrant, which add up to 1, and the medians; None without objects.

    A share is named for what is below STRONG_SCORE: `weak_foreground` alone, `weak_class` alone, `both_weak` or
    `none_weak`.
    """

    num_objects: int
    weak_foreground: float | None
    weak_class: float | None
    both_weak: float | None
    none_weak: float | None
    median_foreground: float | None
    median_class: float | None


@dataclass(frozen=True)
class ForegroundReport:
    """What loses the missed objects: `dataclasses.asdict` makes JSON of it.

    `overall` and, by sqrt(area) in original pixels, `by_aitod_size` and `by_coco_size` hold a `ScoreGroup` for each
    outcome. Missed objects with weak foreground alone are taken for background, those with a weak class alone for
    another class; those with none weak are lost by a poor box or a neighbour that suppresses them, or because two
    strong factors still make a product below `score_threshold`, which a detection needed to find anything.

    `points`: (foreground, class score) by outcome, all or a random MAX_POINTS of them, to draw; `num_points_left_out`
    are the others. `num_not_scored` objects were seen but neither found nor missed: in ignore regions.
    `num_not_observed` were found or missed but no picture showed any of them.
    """

    score_threshold: float
    overall: dict[Outcome, ScoreGroup]
    by_aitod_size: dict[str, dict[Outcome, ScoreGroup]]
    by_coco_size: dict[str, dict[Outcome, ScoreGroup]]
    points: dict[Outcome, list[tuple[float, float]]]
    num_points_left_out: int
    num_not_scored: int
    num_not_observed: int


def foreground_report(
    rows: Iterable[ObjectScore],
    annotations: Iterable[Mapping[str, Any]],
    *,
    missed: AbstractSet[int],
    found: AbstractSet[int],
    score_threshold: float,
) -> ForegroundReport:
    """Compare the objects that detections of at least `score_threshold` missed with those that they found.

    `rows` come from the observers of all workers; of several for one object, from tiles or workers, the one with the
    highest product counts. `missed` and `found` are ids of COCO `annotations`.
    """
    best: dict[int, ObjectScore] = {}
    for row in rows:
        known = best.setdefault(row.annotation_id, row)
        if row.foreground * row.class_score > known.foreground * known.class_score:
            best[row.annotation_id] = row
    seen = (missed | found) & best.keys()
    scored = [annotation for annotation in annotations if annotation["id"] in seen]
    chosen = [best[annotation["id"]] for annotation in scored]
    scores = np.array([(row.foreground, row.class_score) for row in chosen], np.float64).reshape(-1, 2)
    is_missed = np.array([row.annotation_id in missed for row in chosen], bool)
    sides_px = np.sqrt([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in scored])

    def outcomes(selected: NDArray[np.bool_]) -> dict[Outcome, ScoreGroup]:
        return {"missed": _group(scores[selected & is_missed]), "found": _group(scores[selected & ~is_missed])}

    def by_size(limits_px: Mapping[str, float]) -> dict[str, dict[Outcome, ScoreGroup]]:
        bucket = np.searchsorted(list(limits_px.values()), sides_px, side="right")
        return {name: outcomes(bucket == number) for number, name in enumerate(limits_px)}

    drawn = np.arange(len(chosen))
    if len(chosen) > MAX_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(len(chosen), MAX_POINTS, replace=False))
    by_outcome: dict[Outcome, NDArray[np.int64]] = {
        "missed": drawn[is_missed[drawn]],
        "found": drawn[~is_missed[drawn]],
    }
    return ForegroundReport(
        score_threshold=score_threshold,
        overall=outcomes(np.ones(len(chosen), bool)),
        by_aitod_size=by_size(AITOD_SIDES_PX),
        by_coco_size=by_size(COCO_SIDES_PX),
        points={name: [(x, y) for x, y in scores[part].tolist()] for name, part in by_outcome.items()},
        num_points_left_out=len(chosen) - len(drawn),
        num_not_scored=len(best) - len(chosen),
        num_not_observed=len(missed | found) - len(chosen),
    )


def foreground_of_matches(
    rows: Iterable[ObjectScore],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    ignore_rule: IgnoreRule,
    score_threshold: float,
) -> ForegroundReport:
    """The `foreground_report` on what detections of at least `score_threshold` find and miss at IoU .50."""
    annotations = ground_truth["annotations"]
    matches = match(ground_truth, detections, ignore_rule=ignore_rule, score_threshold=score_threshold)
    return foreground_report(
        rows,
        annotations,
        missed={annotations[row]["id"] for image in matches for row in image.misses},
        found={annotations[row]["id"] for image in matches for row, _ in image.hits},
        score_threshold=score_threshold,
    )


def _group(scores: NDArray[np.float64]) -> ScoreGroup:
    """From foreground and class scores (G, 2)."""
    if len(scores) == 0:
        return ScoreGroup(0, None, None, None, None, None, None)
    foreground, classes = (scores < STRONG_SCORE).T
    weak = (foreground & ~classes, classes & ~foreground, foreground & classes, ~foreground & ~classes)
    return ScoreGroup(len(scores), *(float(part.mean()) for part in weak), *np.median(scores, axis=0).tolist())

"""What became of every detection and object at IoU .50: what each part of an analysis reads.

Legend: G ground truths, N detections, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.matching import Pairs, match_greedily, overlapping
from evaluation.outcomes import Outcomes
from evaluation.tables import DetectionTable, TruthTable

IOU_OF_HIT = 0.5
# Detections that overlap less than this lie on background (Bolya et al. 2020).
IOU_OF_BACKGROUND = 0.1


class Judged(NamedTuple):
    """Detections within the limit, by class and descending score, and the ground truths, both outside ignore regions.

    `is_hit` and `is_counted` (N,), `is_scored` (G,): as in `Outcomes`, over all areas at IoU .50, as COCO's AP50 has
    them. `taken` (N,): row of the ground truth, or crowd box, that each detection takes, else NOT_MATCHED. `overlaps`:
    detections with IoU >= .10 on ground truths of any class, without crowds; `is_own_class` (P,): of the same class.
    """

    truths: TruthTable
    detections: DetectionTable
    class_names: tuple[str, ...]
    is_hit: NDArray[np.bool_]
    is_counted: NDArray[np.bool_]
    is_scored: NDArray[np.bool_]
    taken: NDArray[np.int32]
    overlaps: Pairs
    is_own_class: NDArray[np.bool_]

    def found_at(self) -> NDArray[np.float64]:
        """Score of the detection that takes each ground truth (G,); -1 where none does.

        Matching goes down the scores: below a threshold t nothing changes what happens above it, so the objects found
        at t are those with at least t here.
        """
        scores = np.full(len(self.truths.label), -1.0)
        scores[self.taken[self.is_hit]] = self.detections.scores[self.is_hit]
        return scores


def judge(outcomes: Outcomes, class_names: tuple[str, ...]) -> Judged:
    """What `outcomes`, whose first area holds all objects, say at IoU .50, and what lies near to what."""
    truths, detections, is_scored = outcomes.truths, outcomes.detections, outcomes.is_scored[0]
    pairs = overlapping(truths, detections, IOU_OF_BACKGROUND, across_classes=True)
    is_own_class = truths.label[pairs.truth] == detections.label[pairs.detection]
    own = select(pairs, is_own_class)
    taken = match_greedily(own, len(detections.label), truths.is_crowd, ~is_scored[None], np.array([IOU_OF_HIT]))[0, 0]
    on_objects = is_scored[pairs.truth]
    return Judged(
        truths,
        detections,
        class_names,
        outcomes.is_hit[0, 0],
        outcomes.is_counted[0, 0],
        is_scored,
        taken,
        select(pairs, on_objects),
        is_own_class[on_objects],
    )


def select(pairs: Pairs, rows: NDArray[np.bool_]) -> Pairs:
    """The pairs that a mask (P,) names, in their order."""
    return Pairs(pairs.detection[rows], pairs.truth[rows], pairs.iou[rows])

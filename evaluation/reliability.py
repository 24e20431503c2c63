"""Whether scores can be read as probabilities of being right."""

from __future__ import annotations

import numpy as np

from evaluation.analysis_records import Reliability, ReliabilityBin
from evaluation.judged import Judged

# Below the first of them lie most of a detector's boxes, nearly all on background: they would make the error their own.
_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def reliability(judged: Judged) -> Reliability:
    """Detections that count, with scores of at least .05, in ten bins of equal width; that floor cuts the first.

    Right is a hit at IoU .50 of the detection's own class. The last bin includes 1. The calibration error is None
    without any such detection.
    """
    rows = judged.is_counted & (judged.detections.scores >= _BOUNDS[0])
    scores, is_hit = judged.detections.scores[rows], judged.is_hit[rows]
    num_bins = len(_BOUNDS) - 1
    place = np.minimum(np.searchsorted(_BOUNDS, scores, side="right") - 1, num_bins - 1)
    num = np.bincount(place, minlength=num_bins)
    score_sums, hit_sums = (np.bincount(place, column, num_bins) for column in (scores, is_hit))
    bins = [
        ReliabilityBin(low, high, n, score_sum / n if n else None, hit_sum / n if n else None)
        for low, high, n, score_sum, hit_sum in zip(
            _BOUNDS[:-1], _BOUNDS[1:], num.tolist(), score_sums.tolist(), hit_sums.tolist(), strict=True
        )
    ]
    # A gap times its bin's detections is the difference of the two sums.
    gap = float(np.abs(score_sums - hit_sums).sum())
    return Reliability(bins, gap / len(scores) if len(scores) else None)

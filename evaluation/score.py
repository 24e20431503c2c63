"""`Score`: what every protocol makes of one set of detections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Score(NamedTuple):
    """Numbers from 0 to 1 by name, which carries the protocol (`coco/AP`); None without ground truth to score against.

    `per_class` by class name, then metric, with `num_ground_truths`; `counts`: what was scored and what was not;
    `precision_at_50`, of COCO and its relatives, by name of each class with ground truth: precision at `RECALL_POINTS`
    and IoU .50, float64 (101,).
    """

    metrics: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    counts: dict[str, int]
    precision_at_50: Mapping[str, NDArray[np.float64]] = {}


def joined(first: Score, *others: Score) -> Score:
    """The numbers of several scores of the same detections; where two have one name, the earlier's stays."""
    metrics, counts = dict(first.metrics), dict(first.counts)
    per_class = {name: dict(values) for name, values in first.per_class.items()}
    for other in others:
        metrics |= {name: value for name, value in other.metrics.items() if name not in metrics}
        counts |= {name: value for name, value in other.counts.items() if name not in counts}
        for name, values in per_class.items():
            values |= {key: value for key, value in other.per_class.get(name, {}).items() if key not in values}
    return Score(metrics, per_class, counts, first.precision_at_50)


def with_counts_named(score: Score, protocol: str) -> Score:
    """The same with the protocol's name before every count, for where several protocols' numbers stand together."""

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name if "/" in name else f"{protocol}/{name}": value for name, value in values.items()}

    per_class = {name: named(values) for name, values in score.per_class.items()}
    return score._replace(counts=named(score.counts), per_class=per_class)

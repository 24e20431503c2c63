"""`Score`: what every protocol makes of one set of detections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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

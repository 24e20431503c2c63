"""Whether one run is better than another beyond chance: paired bootstrap over the images of one split.

It says how much the difference depends on which pictures were scored, and nothing of another seed's training.

Legend: S samples, I images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.bootstrap import Floats, draw
from evaluation.samples import Samples
from evaluation.tables import Tables

Verdict = Literal["better", "worse", "not distinguishable"]


class NotComparable(ValueError):
    """Two sets of detections whose scores have nothing to do with each other, or too few images to resample."""


# Detections with their ground truth, and how often each image is in each sample (I, S).
Sampler = Callable[[Tables, Floats], Samples]


@dataclass(frozen=True)
class Difference:
    """A metric of both runs and the second's less the first's; None without ground truth.

    `low` to `high`: percentile interval of the difference over `num_samples`, those that have something to find.
    `share_better`: of these, the share in which the second run scores higher. `verdict` is on the second run.
    """

    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    share_better: float | None
    num_samples: int
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """Differences by metric, and by class name and metric. `num_groups` of images were drawn for each sample."""

    num_images: int
    num_groups: int
    num_samples: int
    seed: int
    confidence: float
    metrics: dict[str, Difference]
    per_class: dict[str, dict[str, Difference]]


def compare(
    first: Tables,
    second: Tables,
    sample: Sampler,
    *,
    groups: NDArray[np.int64] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Score both on the same samples of images, drawn with replacement; one image a group without `groups` (I,).

    Raises:
        NotComparable: images, classes or ground truth are not the same; there are fewer than two groups.
        ValueError: `groups` has not one number an image, `num_samples` is below 1, `confidence` is not between 0 and 1.
    """
    num_images = len(first.image_ids)
    groups = np.arange(num_images) if groups is None else groups
    if len(groups) != num_images:
        raise ValueError(f"groups has {len(groups)} numbers for {num_images} images; it must have one for each")
    if num_samples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_samples is {num_samples}, confidence {confidence}; they must be at least 1, and between 0 and 1"
        )
    _check_same(first, second)
    num_groups = _require_groups(groups)
    weights = draw(groups, num_samples, seed)
    one, two = sample(first, weights), sample(second, weights)

    def differences(of_first: dict[str, Floats], of_second: dict[str, Floats]) -> dict[str, Difference]:
        return {name: _difference(values, of_second[name], confidence) for name, values in of_first.items()}

    return Comparison(
        num_images,
        num_groups,
        num_samples,
        seed,
        confidence,
        differences(one.metrics, two.metrics),
        {name: differences(values, two.per_class[name]) for name, values in one.per_class.items()},
    )


def _difference(first: Floats, second: Floats, confidence: float) -> Difference:
    """From (1 + S,): the whole set, then the samples."""
    differences = second - first
    if np.isnan(differences[0]):
        return Difference(None, None, None, None, None, None, 0, None)
    drawn = differences[1:][~np.isnan(differences[1:])]
    low = high = share_better = None
    verdict: Verdict | None = None
    if len(drawn):
        low, high = _bounds(drawn, confidence)
        share_better = float((drawn > 0).mean())
        verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    return Difference(
        float(first[0]), float(second[0]), float(differences[0]), low, high, share_better, len(drawn), verdict
    )


def _check_same(first: Tables, second: Tables) -> None:
    parts = {
        "image ids": (first.image_ids, second.image_ids),
        "class ids": (first.class_ids, second.class_ids),
        "class names": (np.array(first.class_names), np.array(second.class_names)),
        "ground truths": (_rows(first), _rows(second)),
        "ignore regions": tuple(np.concatenate([np.empty((0, 4)), *t.ignore_regions_xywh_px]) for t in (first, second)),
    }
    differing = [
        f"{what} ({len(one)} and {len(two)})" for what, (one, two) in parts.items() if not np.array_equal(one, two)
    ]
    if differing:
        raise NotComparable(
            f"the two sets of detections belong to different {', '.join(differing)}: a difference of their scores "
            "would say nothing. Score both on one version of the dataset and one split"
        )


def _rows(tables: Tables) -> NDArray[np.float64]:
    truths = tables.truths
    return np.column_stack([truths.image, truths.label, truths.boxes_xywh_px, truths.areas_px, truths.is_crowd])


def intervals(
    tables: Tables,
    sample: Sampler,
    *,
    groups: NDArray[np.int64] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of one run's metrics over samples of its images, drawn as in `compare`.

    A metric that has no value, on the whole split or in any sample, is left out.

    Raises:
        NotComparable: there are fewer than two groups.
    """
    groups = np.arange(len(tables.image_ids)) if groups is None else groups
    _require_groups(groups)
    scores = sample(tables, draw(groups, num_samples, seed)).metrics
    drawn = {name: values[1:][~np.isnan(values[1:])] for name, values in scores.items() if not np.isnan(values[0])}
    return {name: _bounds(values, confidence) for name, values in drawn.items() if len(values)}


def _require_groups(groups: NDArray[np.int64]) -> int:
    """How many groups there are; raises NotComparable where they are too few."""
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise NotComparable(
            f"{len(groups)} images in {num_groups} group(s): every sample would be the same. Take a split with more"
        )
    return num_groups


def _bounds(drawn: Floats, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return low, high

"""Whether one run is better than another beyond chance: paired bootstrap over the images of one split.

It says how much the difference depends on which pictures were scored, and nothing of another seed's training.

Legend: S samples, I images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.bootstrap import Floats, draw, resample
from evaluation.coco import CocoRules, scored_rows
from evaluation.ignore import IgnoreRule
from evaluation.outcomes import Outcomes, outcomes_of
from evaluation.tables import Tables

Verdict = Literal["better", "worse", "not distinguishable"]


class NotComparable(ValueError):
    """Two sets of detections whose scores have nothing to do with each other, or too few images to resample."""


class Samples(NamedTuple):
    """Scores of S samples: (S,) by metric, and by class and metric; NaN where a sample has nothing to find."""

    metrics: dict[str, Floats]
    per_class: dict[str, dict[str, Floats]]


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
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise NotComparable(
            f"{num_images} images in {num_groups} group(s): every sample would be the same. Take a split with more"
        )
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


def coco_samples(tables: Tables, weights: Floats, *, rules: CocoRules, ignore_rule: IgnoreRule) -> Samples:
    """COCO's AP, AP50, AP75, AP by area, AR at the last limit, and AP and AP50 of each class, named as in `coco`."""
    truths, detections, _ = scored_rows(tables, ignore_rule)
    outcomes = outcomes_of(truths, detections, rules.areas, rules.limits[-1])
    ap, recall = resample(outcomes, weights, len(tables.class_ids), all_points=False)
    prefix, whole = rules.prefix, ap[:, 0]
    metrics = {
        f"{prefix}/AP": _class_mean(whole.mean(axis=1)),
        f"{prefix}/AP50": _class_mean(whole[:, 0]),
        f"{prefix}/AP75": _class_mean(whole[:, 5]),
    }
    metrics |= {
        f"{prefix}/AP_{size}": _class_mean(ap[:, a + 1].mean(axis=1)) for a, size in enumerate([*rules.areas][1:])
    }
    metrics[f"{prefix}/AR_{rules.limits[-1]}"] = _class_mean(recall[:, 0].mean(axis=1))
    return Samples(metrics, _per_class(whole, tables.class_names, prefix))


def voc_samples(outcomes: Outcomes, weights: Floats, class_names: tuple[str, ...]) -> Samples:
    """VOC's mAP50 and AP50 of each class, the area under the curve; from outcomes at IoU .50 in one view."""
    ap, _ = resample(outcomes, weights, len(class_names), all_points=True)
    return Samples({"voc/mAP50": _class_mean(ap[:, 0, 0])}, _per_class(ap[:, 0], class_names, "voc"))


def visdrone_samples(outcomes: Outcomes, weights: Floats, class_names: tuple[str, ...], *, max_dets: int) -> Samples:
    """VisDrone's AP, AP50, AP75 and AR at `max_dets`; a class weighs as much as the sample's images that contain it.

    From outcomes at ten IoU thresholds in one view, of the detections within `max_dets`.
    """
    ap, recall = (scores[:, 0] for scores in resample(outcomes, weights, len(class_names), all_points=True))
    contains = np.zeros((len(class_names), len(weights)))
    scored = outcomes.truths.take(outcomes.is_scored[0] & (outcomes.truths.label < len(class_names)))
    contains[scored.label, scored.image] = 1
    frequency = (contains @ weights).T
    metrics = {
        "visdrone/AP": _class_mean(ap.mean(axis=1), frequency),
        "visdrone/AP50": _class_mean(ap[:, 0], frequency),
        "visdrone/AP75": _class_mean(ap[:, 5], frequency),
        f"visdrone/AR_{max_dets}": _class_mean(recall.mean(axis=1), frequency),
    }
    return Samples(metrics, _per_class(ap, class_names, "visdrone"))


def _per_class(ap: Floats, class_names: tuple[str, ...], prefix: str) -> dict[str, dict[str, Floats]]:
    """AP over all thresholds, where there are several, and AP50, from (S, T, C)."""
    rows: dict[str, dict[str, Floats]] = {}
    for label, name in enumerate(class_names):
        over_all = {f"{prefix}/AP": ap[:, :, label].mean(axis=1)} if ap.shape[1] > 1 else {}
        rows[name] = {**over_all, f"{prefix}/AP50": ap[:, 0, label]}
    return rows


def _class_mean(values: Floats, weights: Floats | None = None) -> Floats:
    """Mean over the classes that a sample has, (S,) from (S, C); NaN where it has none."""
    is_known = ~np.isnan(values)
    shares = is_known * (1.0 if weights is None else weights)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(is_known, values * shares, 0).sum(axis=1) / shares.sum(axis=1)
    return means


def _difference(first: Floats, second: Floats, confidence: float) -> Difference:
    """From (1 + S,): the whole set, then the samples."""
    differences = second - first
    if np.isnan(differences[0]):
        return Difference(None, None, None, None, None, None, 0, None)
    drawn = differences[1:][~np.isnan(differences[1:])]
    low = high = share_better = None
    verdict: Verdict | None = None
    if len(drawn):
        tail = (1 - confidence) / 2
        low, high = (float(bound) for bound in np.quantile(drawn, [tail, 1 - tail]))
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

"""Scores of resampled images by every protocol, without matching again.

Legend: S samples, I images, T IoU thresholds, C classes, N detections, G ground truths.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.bootstrap import Floats, resample
from evaluation.coco import CocoRules, aitod_rules, coco_rules, scored_rows
from evaluation.ignore import IgnoreRule
from evaluation.outcomes import Outcomes, outcomes_of
from evaluation.protocols import ProtocolName
from evaluation.tables import Tables
from evaluation.uavdt import class_aware_outcomes, pooled_outcomes
from evaluation.visdrone import VisDroneOutcomes, visdrone_outcomes
from evaluation.voc import RankedOutcomes, voc_outcomes


class Samples(NamedTuple):
    """Scores of S samples: (S,) by metric, and by class and metric; NaN where a sample has nothing to find."""

    metrics: dict[str, Floats]
    per_class: dict[str, dict[str, Floats]]


def samples_by(
    protocol: ProtocolName, tables: Tables, weights: Floats, *, max_dets: int, ignore_rule: IgnoreRule
) -> Samples:
    """COCO's numbers, and beside them those of `protocol`, of samples with image i `weights[i]` times, (I, S).

    `max_dets` is COCO's limit; other protocols have their own.
    """
    coco = coco_samples(tables, weights, rules=coco_rules(max_dets), ignore_rule=ignore_rule)
    if protocol == "coco":
        return coco
    if protocol == "aitod":
        own = coco_samples(tables, weights, rules=aitod_rules(), ignore_rule=ignore_rule)
    elif protocol == "voc":
        truths, detections, _ = scored_rows(tables, ignore_rule)
        own = voc_samples(_at_one_iou(voc_outcomes(truths, detections)), weights, tables.class_names)
    elif protocol == "visdrone":
        drone = visdrone_outcomes(tables)
        outcomes = _in_one_view(drone, drone.is_hit[-1], drone.is_counted)
        own = visdrone_samples(outcomes, weights, tables.class_names, max_dets=drone.limits[-1])
    else:
        own = uavdt_samples(tables, weights)
    per_class = {name: values | own.per_class.get(name, {}) for name, values in coco.per_class.items()}
    return Samples(coco.metrics | own.metrics, per_class)


def uavdt_samples(tables: Tables, weights: Floats) -> Samples:
    """UAVDT's AP70 of all classes as one, and the class-aware AP70, which has a value for each class."""
    pooled, _ = pooled_outcomes(tables)
    as_one, _ = resample(_at_one_iou(pooled), weights, 1, all_points=True)
    aware, _ = resample(_at_one_iou(class_aware_outcomes(tables)), weights, len(tables.class_names), all_points=True)
    by_class, name = aware[:, 0, 0], "uavdt/AP70_class_aware"
    return Samples(
        {"uavdt/AP70": as_one[:, 0, 0, 0], name: _class_mean(by_class)},
        {class_name: {name: by_class[:, label]} for label, class_name in enumerate(tables.class_names)},
    )


def _at_one_iou(ranked: RankedOutcomes) -> Outcomes:
    return _in_one_view(ranked, ranked.is_hit[None], ranked.is_counted[None])


def _in_one_view(
    found: RankedOutcomes | VisDroneOutcomes, is_hit: NDArray[np.bool_], is_counted: NDArray[np.bool_]
) -> Outcomes:
    """Outcomes that know no areas, from `is_hit` and `is_counted` (T, N)."""
    ranks = np.zeros_like(found.detections.label)
    return Outcomes(found.truths, found.detections, ranks, is_hit[None], is_counted[None], found.is_scored[None])


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
    frequency = np.einsum("ci,is->sc", contains, weights)
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

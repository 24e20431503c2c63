"""One split's analysis: where its score is lost, and how the model behaves where it is used."""

from __future__ import annotations

from evaluation.analysis_records import SIZES_PX, Analysis, IgnoredHits, OperatingPoint
from evaluation.coco import coco_rules, mean_of_known, scored_rows
from evaluation.confusion import confusion, recall_by_size
from evaluation.error_types import error_types
from evaluation.ignore import IgnoreRule
from evaluation.inspection import inspection
from evaluation.judged import judge
from evaluation.operating_point import choose_operating_point, measure_operating_point
from evaluation.outcomes import curves_of, outcomes_of
from evaluation.reliability import reliability
from evaluation.score import Score
from evaluation.tables import Tables


def analyse(
    tables: Tables,
    *,
    ignore_rule: IgnoreRule,
    max_dets: int,
    operating_point: OperatingPoint | None = None,
    chosen_on: str,
) -> Analysis:
    """Analyse one split by COCO's rules at IoU .50, with `max_dets` detections per image and class.

    Without `operating_point` this split, `chosen_on`, chooses it. What is said "at the operating point" is said at its
    `shown_score`, one for all classes.

    Raises:
        ValueError: `max_dets` is below 1.
    """
    truths, detections, _ = scored_rows(tables, ignore_rule)
    areas = {"all": coco_rules(max_dets).areas["all"]} | {name: (a**2, b**2) for name, (a, b) in SIZES_PX.items()}
    outcomes = outcomes_of(truths, detections, areas, max_dets)
    judged = judge(outcomes, tables.class_names)
    precision, _ = curves_of(outcomes, len(tables.class_names), ())
    chosen = operating_point or choose_operating_point(judged)
    threshold = chosen.shown_score
    num_in_regions = (tables.detections.scores >= threshold).sum() - (detections.scores >= threshold).sum()
    num_on_crowds = (~judged.is_counted & (judged.detections.scores >= threshold)).sum()
    return Analysis(
        measure_operating_point(judged, chosen),
        chosen_on,
        error_types(judged, threshold),
        recall_by_size(judged, threshold),
        {name: mean_of_known(precision[..., place]) for place, name in enumerate(areas) if place},
        confusion(judged, threshold),
        reliability(judged),
        inspection(tables, judged, threshold),
        IgnoredHits(int(num_in_regions), int(num_on_crowds)),
    )


def headline(analysis: Analysis) -> Score:
    """What runs are compared by, as metrics `analysis/...`; per class the threshold of the highest F1.

    `analysis/threshold`, `precision`, `recall` and `f1` are those of the operating point, at IoU .50.
    """
    overall, at = analysis.operating_point.overall, analysis.inspection.at_operating_point
    metrics: dict[str, float | None] = {
        "threshold": None if overall is None else overall.score,
        "precision": None if overall is None else overall.precision,
        "recall": None if overall is None else overall.recall,
        "f1": None if overall is None else overall.f1,
        "escape_rate": at.escape_rate,
        "overkill_rate": at.overkill_rate,
        "false_positives_per_clean_image": at.false_positives_per_clean_image,
        "calibration_error": analysis.reliability.expected_calibration_error,
    }
    metrics |= {f"lost_AP50_{name.replace(' ', '_')}": lost for name, lost in analysis.error_types.lost_ap50.items()}
    metrics |= {f"AP_{size.replace(' ', '_')}": ap for size, ap in analysis.ap_by_size.items()}
    for row in analysis.recall_by_size:
        share = row.num_found_at_threshold / row.num_objects if row.num_objects else None
        metrics[f"recall_{row.size.replace(' ', '_')}"] = share
    per_class: dict[str, dict[str, float | None]] = {}
    for name, best in analysis.operating_point.per_class.items():
        score, f1 = (None, None) if best is None else (best.score, best.f1)
        per_class[name] = {"analysis/threshold": score, "analysis/f1": f1}
    return Score({f"analysis/{name}": value for name, value in metrics.items()}, per_class, {})

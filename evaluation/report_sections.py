"""Sections of a run's report: for each the charts and tables of all splits, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.page import table
from evaluation.analysis_records import Analysis, SizeRecall, Threshold
from evaluation.charts import (
    ap_bars,
    confusion_table,
    error_table,
    inspection_chart,
    pr_curves,
    reliability_chart,
    shaded,
    size_bars,
)
from evaluation.result import ScoreResult

UNKNOWN = "–"


class SplitReport(NamedTuple):
    """One split of a run: its score, what the score is made of, and the COCO dicts both come from."""

    result: ScoreResult
    precision_at_50: Mapping[str, NDArray[np.float64]]
    analysis: Analysis
    ground_truth: Mapping[str, Any]
    detections: Sequence[Mapping[str, Any]]


def analysis_sections(splits: Sequence[SplitReport]) -> dict[str, str]:
    """HTML by title, in the order in which a user asks."""
    return {
        "Where AP is lost": _errors(splits),
        "Sizes": _sizes(splits),
        "Classes": _classes(splits),
        "Thresholds": _thresholds(splits),
        "Confusion": _confusion(splits),
        "Reliability of scores": _reliability(splits),
        "Inspection": _inspection(splits),
    }


def of_protocols(names: Iterable[str]) -> list[str]:
    """The names, each once, without those of the analysis: it has sections of its own."""
    return [name for name in dict.fromkeys(names) if not name.startswith("analysis/")]


def number(value: float | None) -> str:
    """A metric, with three decimals."""
    return UNKNOWN if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A whole number."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def _errors(splits: Sequence[SplitReport]) -> str:
    def draw(split: SplitReport) -> str:
        errors = split.analysis.error_types
        return f"<p>AP50 {number(errors.ap50)}</p>" + (
            error_table(errors) if errors.lost_ap50 else "<p>Nothing to lose: no ground truth.</p>"
        )

    ignored = "".join(
        f"<p>{split.result.split}: {split.analysis.ignored_hits.in_regions:,} detections in ignore regions and "
        f"{split.analysis.ignored_hits.on_crowds:,} on crowd boxes count neither way at the operating point.</p>"
        for split in splits
    )
    return ignored + _side_by_side(
        splits, draw,
        "What AP50, the mean over classes, would gain if errors of one type alone were mended, at all scores as AP is: "
        "the longest bar of the six types is what to work on first. The parts do not add up to all that is lost. "
        "Errors are counted at the operating point.",
    )  # fmt: skip


def _sizes(splits: Sequence[SplitReport]) -> str:
    parts = [
        _side_by_side(
            splits, lambda split: size_bars(split.analysis.recall_by_size),
            "Share of the objects found at IoU .50, by sqrt(area). The gap between the two bars is found, but with a "
            "score below the operating point; what the first bar lacks is not found at all.",
        )
    ]  # fmt: skip
    for prefix in dict.fromkeys(name.partition("/")[0] for split in splits for name in split.result.metrics):
        if any(_ap_by_size(prefix, split) for split in splits):
            parts.append(
                _side_by_side(
                    splits, partial(_ap_chart, prefix),
                    "COCO's AP by AI-TOD's sizes: where the bars fall, the model loses." if prefix == "analysis" else
                    f"AP of {prefix} by that protocol's own sizes.",
                )
            )  # fmt: skip
    last = splits[-1]
    return "".join(parts) + _recall_by_class(last.analysis.recall_by_size, last.result.split)


def _ap_chart(prefix: str, split: SplitReport) -> str:
    return ap_bars(_ap_by_size(prefix, split), f"{prefix}: AP by size")


def _ap_by_size(prefix: str, split: SplitReport) -> dict[str, float | None]:
    start = f"{prefix}/AP_"
    metrics = split.result.metrics.items()
    return {name.removeprefix(start).replace("_", " "): value for name, value in metrics if name.startswith(start)}


def _recall_by_class(sizes: Sequence[SizeRecall], split: str) -> str:
    rows = []
    for name in dict.fromkeys(name for size in sizes for name, (total, _, _) in size.per_class.items() if total):
        cells = []
        for size in sizes:
            total, _, found = size.per_class.get(name, (0, 0, 0))
            share = f"{found / total:.2f} <small>of {total:,}</small>" if total else ""
            cells.append(shaded(found / total, share) if total else "")
        rows.append((escape(name), *cells))
    if not rows:
        return ""
    return (
        f'<div class="scroll">{table((f"recall on {split}", *(escape(size.size) for size in sizes)), rows)}</div>'
        '<p class="reading">Share found at the operating point by class and size, and of how many: pale cells with '
        "many objects are what the model does not see.</p>"
    )


def _classes(splits: Sequence[SplitReport]) -> str:
    per_class = [split.result.per_class for split in splits]
    metrics = of_protocols(metric for classes in per_class for row in classes.values() for metric in row)
    lead = next((metric for metric in metrics if metric.endswith("/AP")), metrics[0] if metrics else "")

    def ap_of(name: str) -> float:
        value = per_class[-1].get(name, {}).get(lead)
        return math.inf if value is None else value

    names = sorted(dict.fromkeys(name for classes in per_class for name in classes), key=ap_of)
    head = [f"{_metric_name(metric)}<br><small>{split.result.split}</small>" for metric in metrics for split in splits]
    rows = [
        (
            escape(name),
            *(_cell(metric, classes.get(name, {}).get(metric)) for metric in metrics for classes in per_class),
        )
        for name in names
    ]
    return (
        _side_by_side(
            splits, lambda split: pr_curves(split.precision_at_50),
            "Precision at each recall, going down through the scores at IoU .50; the area below a line is AP50. Where "
            "a line falls to 0, the rest is never found.",
        )
        + f'<div class="scroll">{table(("class, lowest AP first", *head), rows)}</div>'
    )  # fmt: skip


_GIVEN = ("precision", "recall", "F1")


def _thresholds(splits: Sequence[SplitReport]) -> str:
    parts = []
    for chosen_on in dict.fromkeys(split.analysis.chosen_on for split in splits):
        under = [split for split in splits if split.analysis.chosen_on == chosen_on]
        points = [split.analysis.operating_point for split in under]
        names = dict.fromkeys(name for point in points for name in point.per_class)
        rows = [("<b>all classes together</b>", *_gives([point.overall for point in points]))]
        rows += [(escape(name), *_gives([point.per_class.get(name) for point in points])) for name in names]
        measured = [f"{what}<br><small>{split.result.split}</small>" for split in under for what in _GIVEN]
        head = (f"chosen on {escape(chosen_on)}", "threshold", *measured)
        parts.append(f'<div class="scroll">{table(head, rows)}</div>')
    return "".join(parts) + (
        '<p class="reading">The score from which on to count detections for the highest F1 at IoU .50, and what that '
        "gives. Charts and pictures of this page use the threshold of all classes together.</p>"
    )


def _confusion(splits: Sequence[SplitReport]) -> str:
    parts = [
        f'<h3>{split.result.split}</h3><div class="scroll">{confusion_table(split.analysis.confusion)}</div>'
        for split in splits
    ]
    return "".join(parts) + (
        '<p class="reading">Rows are true classes, columns the class that was reported, at the operating point; the '
        "darker, the greater its share of the row. Off the diagonal are confusions; the last row counts "
        "detections left over: on no object, too far off, or on one that another has found.</p>"
    )


def _reliability(splits: Sequence[SplitReport]) -> str:
    def draw(split: SplitReport) -> str:
        reliability = split.analysis.reliability
        gap = number(reliability.expected_calibration_error)
        return f"<p>mean gap {gap}</p>" + reliability_chart(reliability)

    return _side_by_side(
        splits, draw,
        "Share of right detections by score, from .05 on; below, how many have that score. On the dashed line a score "
        "of .8 means right in 8 of 10 cases; below it the model is too sure of itself.",
    )  # fmt: skip


def _inspection(splits: Sequence[SplitReport]) -> str:
    def draw(split: SplitReport) -> str:
        inspection = split.analysis.inspection
        with_objects, without = inspection.num_images_with_objects, inspection.num_images_without
        point = asdict(inspection.at_operating_point)
        rows = [(name.replace("_", " "), number(value)) for name, value in point.items()]
        numbers = table(("at the operating point", ""), rows)
        said = f"<p>{with_objects:,} images with objects, {without:,} without.</p>" + numbers
        if not with_objects or not without:
            return f"{said}<p>Without images of both kinds there is no curve.</p>"
        return said + inspection_chart(inspection)

    return _side_by_side(
        splits, draw,
        "Whole images: escape is the share of images with objects in which nothing is reported, overkill the share of "
        "images without in which something is. Towards the lower left corner both kinds of error become fewer.",
    )  # fmt: skip


def _side_by_side(splits: Sequence[SplitReport], draw: Callable[[SplitReport], str], reading: str) -> str:
    figures = "".join(f"<figure><h3>{split.result.split}</h3>{draw(split)}</figure>" for split in splits)
    return f'<div class="charts">{figures}</div><p class="reading">{reading}</p>'


def _gives(thresholds: Sequence[Threshold | None]) -> tuple[str, ...]:
    """One score, and what it gives on each split."""
    score = next((threshold.score for threshold in thresholds if threshold is not None), None)
    given = [
        value
        for threshold in thresholds
        for value in ((None,) * 3 if threshold is None else (threshold.precision, threshold.recall, threshold.f1))
    ]
    return number(score), *map(number, given)


def _metric_name(metric: str) -> str:
    return "objects" if metric == "num_ground_truths" else escape(metric)


def _cell(metric: str, value: float | None) -> str:
    return count(value) if metric.startswith("num_") else number(value)

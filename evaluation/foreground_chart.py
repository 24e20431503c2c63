"""The picture of a `ForegroundReport`. matplotlib is imported inside the function, and only its `Figure`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.colours import PALETTE
from evaluation.foreground import STRONG_SCORE, ForegroundReport, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: dict[Outcome, str] = {"found": PALETTE[5], "missed": PALETTE[3]}
_MARKERS: dict[Outcome, str] = {"found": "o", "missed": "x"}
_BINS = np.linspace(0, 1, 26)
# Of a quadrant: the share's name, what to call it, and where its corner lies (right, above).
_CORNERS = (
    ("weak_foreground", "weak foreground, strong class", (False, True)),
    ("none_weak", "both strong", (True, True)),
    ("both_weak", "both weak", (False, False)),
    ("weak_class", "strong foreground, weak class", (True, False)),
)


def foreground_chart(report: ForegroundReport, path: Path) -> None:
    """Write class over foreground score of the missed and the found objects as PNG, with the share of each quadrant.

    Above and beside the scatter stand the distributions of each score. Along the curve the product is the score
    threshold: below it nothing is detected. An object found all the same owes that to an anchor point that was not
    asked for it, such as a neighbour's.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.5), dpi=140, layout="constrained")
    ((above, corner), (axes, beside)) = figure.subplots(
        2, 2, sharex="col", sharey="row", width_ratios=(4.4, 1.2), height_ratios=(1, 5)
    )
    corner.set_axis_off()
    for outcome, colour in _COLOURS.items():
        points = np.array(report.points[outcome]).reshape(-1, 2)
        axes.scatter(*points.T, s=16, marker=_MARKERS[outcome], color=colour, alpha=0.5, linewidth=0.9,
                     label=f"{outcome} ({report.overall[outcome].num_objects:,})")  # fmt: skip
        if len(points):
            weights = np.full(len(points), 1 / len(points))
            for histogram, values, orientation in (
                (above, points[:, 0], "vertical"),
                (beside, points[:, 1], "horizontal"),
            ):
                histogram.hist(values, _BINS, weights=weights, orientation=orientation, histtype="step", color=colour,
                               linewidth=1.8)  # fmt: skip
    _quadrants(axes, report)
    if report.score_threshold > 0:
        foreground = np.linspace(report.score_threshold, 1, 200)
        axes.plot(foreground, report.score_threshold / foreground, color="0.35", linewidth=1.2, linestyle="--",
                  label=f"score {report.score_threshold:.3f}")  # fmt: skip
    axes.set(xlabel="foreground score p(F)", ylabel="class score p(C|F) of the object's own class",
             xlim=(-0.02, 1.02), ylim=(-0.16, 1.16), yticks=np.linspace(0, 1, 6))  # fmt: skip
    above.set(ylabel="share")
    beside.set(xlabel="share")
    for panel in (axes, above, beside):
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    legend = corner.legend(*axes.get_legend_handles_labels(), loc="center", frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    figure.suptitle(_title(report), fontsize=11)
    figure.savefig(path)


def _quadrants(axes: Axes, report: ForegroundReport) -> None:
    """Lines between the quadrants, and their shares beyond the ends of the class score, where no point lies."""
    axes.axhline(STRONG_SCORE, color="0.35", linewidth=0.8)
    axes.axvline(STRONG_SCORE, color="0.35", linewidth=0.8)
    for name, text, (right, high) in _CORNERS:
        x, y, side = (1.0 if right else 0.0), (1.125 if high else -0.055), ("right" if right else "left")
        axes.text(x, y, text, ha=side, va="center", fontsize=10)
        for line, outcome in enumerate(_COLOURS, start=1):
            share = getattr(report.overall[outcome], name)
            if share is not None:
                axes.text(x, y - 0.035 * line, f"{share:.0%} of {outcome}", ha=side, va="center", fontsize=9,
                          color=_COLOURS[outcome], weight="bold")  # fmt: skip


def _title(report: ForegroundReport) -> str:
    missed = report.overall["missed"]
    total = missed.num_objects + report.overall["found"].num_objects
    if missed.weak_foreground is None:
        return f"None of {total:,} objects is missed" if total else "No ground truth"
    left_out = f"; {report.num_points_left_out:,} points not drawn" if report.num_points_left_out else ""
    return (
        f"{missed.num_objects:,} of {total:,} objects are missed, {missed.weak_foreground:.0%} of these\n"
        f"with a strong class score and a weak foreground score{left_out}"
    )

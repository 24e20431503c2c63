"""Charts of a run's report as inline SVG and HTML: no script, no font, no file beside the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.colours import PALETTE, class_colour
from data.page import bar, grid, round_up, svg, swatch, table, text
from evaluation.analysis_records import Confusion, ErrorTypes, Inspection, Reliability, SizeRecall
from evaluation.outcomes import RECALL_POINTS

MAX_NAMED_CURVES = 14
MAX_CONFUSED_CLASSES = 12
_INK, _SECOND_INK = PALETTE[5], PALETTE[0]
_WIDTH, _HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 30, 46
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_DASHES = ("", "6 3")
_ERRORS = {
    "class": "right place, wrong class",
    "localisation": "right class, box too far off",
    "both": "wrong class and box too far off",
    "duplicate": "one more box on an object that is found",
    "background": "on no object",
    "missed": "objects that nothing above explains",
    "false positives": "all wrong detections at once",
    "false negatives": "all objects without a hit at once",
}


class Column(NamedTuple):
    """A bar that stands: its height 0..1, None where there is nothing to measure, and what it says when pointed at."""

    share: float | None
    title: str


def pr_curves(precision_at_50: Mapping[str, NDArray[np.float64]]) -> str:
    """Precision over recall at IoU .50 by class, and their mean in black; as `Score.precision_at_50`.

    Of more than MAX_NAMED_CURVES classes the lowest ones are named, as many as there are colours; the others are grey.
    """
    ap = {name: float(curve.mean()) for name, curve in precision_at_50.items()}
    lowest = sorted(ap, key=ap.__getitem__)
    named = set(lowest if len(ap) <= MAX_NAMED_CURVES else lowest[: len(PALETTE)])
    places = {name: place for place, name in enumerate(name for name in ap if name in named)}
    lines, legend = [_unit_grid("recall", "precision")], []
    for name in sorted(ap, key=lambda name: name in named):
        dashes = _DASHES[places[name] // len(PALETTE)] if name in named else ""
        colour = class_colour(places[name]) if name in named else "#c4cad1"
        title = f"{name}: AP50 {ap[name]:.3f}"
        points = zip(RECALL_POINTS, precision_at_50[name], strict=True)
        lines.append(_line(points, f'stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dashes}"', title))
        if name in named:
            legend.append((ap[name], _line_swatch(f"{ap[name]:.3f} {name}", colour, dashes)))
    if not ap:
        return svg(_WIDTH, _HEIGHT, [*lines, _said("no ground truth")], "Precision and recall: no ground truth")
    mean = np.mean(list(precision_at_50.values()), axis=0)
    title = f"mean of {len(ap)} classes: AP50 {mean.mean():.3f}"
    lines.append(_line(zip(RECALL_POINTS, mean, strict=True), 'stroke="#000" stroke-width="3"', title))
    entries = [_line_swatch(f"{mean.mean():.3f} mean of {len(ap)} classes", "#000", "")]
    entries += [entry for _, entry in sorted(legend, reverse=True)]
    if len(named) < len(ap):
        others = f"the other {len(ap) - len(named)}; named are those of lowest AP50"
        entries.append(_line_swatch(others, "#c4cad1", ""))
    return svg(_WIDTH, _HEIGHT, lines, f"Precision over recall at IoU .50, {title}") + _legend(entries)


def size_bars(sizes: Sequence[SizeRecall]) -> str:
    """Share of the objects of each size that were found: at any score, and at the operating point."""
    groups = [
        (size.size.replace(" and more", "+"), f"{size.num_objects:,} objects", [
            Column(found / size.num_objects if size.num_objects else None,
                   f"{size.size}, {what}: {found:,} of {size.num_objects:,} found")
            for found, what in ((size.num_found, "any score"), (size.num_found_at_threshold, "operating point"))
        ])
        for size in sizes
    ]  # fmt: skip
    legend = [swatch("at any score", _INK), swatch("at the operating point", _SECOND_INK)]
    return columns(groups, "recall at IoU .50", "Recall by size of the objects") + _legend(legend)


def ap_bars(ap: Mapping[str, float | None], title: str) -> str:
    """AP by name of a size; None where there is no such object."""
    groups = [
        (
            name.replace(" and more", "+"),
            "" if value is not None else "no objects",
            [Column(value, f"{name}: AP {_number(value)}")],
        )
        for name, value in ap.items()
    ]
    return columns(groups, "AP", title)


def columns(groups: Sequence[tuple[str, str, Sequence[Column]]], y_title: str, title: str) -> str:
    """Groups of bars, each with a name and a line below it, on a scale from 0 to 1; their values stand above them."""
    step = _PLOT_WIDTH / max(len(groups), 1)
    parts = [grid(1, _LEFT, _WIDTH - _RIGHT, _TOP, _PLOT_HEIGHT), text(0, 13, y_title, "start")]
    for number, (name, below, bars) in enumerate(groups):
        width = min((step - 14) / len(bars), 44)
        middle = _LEFT + (number + 0.5) * step
        for place, (share, words) in enumerate(bars):
            if share is not None:
                x, y = middle + (place - len(bars) / 2) * width, _y(share)
                parts.append(
                    f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{_y(0) - y:.1f}" '
                    f'fill="{(_INK, _SECOND_INK)[place]}"><title>{escape(words)}</title></rect>'
                )
                parts.append(text(x + width / 2, y - 4, f"{share:.2f}", "middle"))
        parts.append(text(middle, _HEIGHT - 28, name, "middle"))
        parts.append(text(middle, _HEIGHT - 12, below, "middle"))
    words = "; ".join(bar.title for _, _, bars in groups for bar in bars)
    return svg(_WIDTH, _HEIGHT, parts, f"{title}. {words}")


def error_table(errors: ErrorTypes) -> str:
    """What each type of error costs, and how often it occurs."""
    peak = max([*errors.lost_ap50.values(), 1e-9])
    rows = [
        (
            f"{escape(kind)}<br><small>{_ERRORS.get(kind, '')}</small>",
            f"{lost:.3f}{bar(max(lost, 0) / peak, _INK)}",
            f"{errors.counts[kind]:,}" if kind in errors.counts else "",
        )
        for kind, lost in errors.lost_ap50.items()
    ]
    return table(("type of error", "AP50 lost", "errors counted"), rows, "errors")


def confusion_table(confusion: Confusion) -> str:
    """Counts by true class and the class that was said, each row shaded by its shares.

    Of more than MAX_CONFUSED_CLASSES those are shown that are confused with other classes most often; the others are
    added up.
    """
    counts = np.array(confusion.counts, np.int64).reshape(len(confusion.counts), -1)
    names = [*confusion.class_names]
    note = ""
    if len(names) > MAX_CONFUSED_CLASSES:
        between = counts[:-1, :-1] - np.diag(np.diag(counts[:-1, :-1]))
        confused = between.sum(axis=0) + between.sum(axis=1)
        chosen = np.sort(np.argsort(-confused, kind="stable")[:MAX_CONFUSED_CLASSES])
        group = np.full(len(names) + 1, MAX_CONFUSED_CLASSES)
        group[chosen], group[-1] = np.arange(MAX_CONFUSED_CLASSES), MAX_CONFUSED_CLASSES + 1
        merged = np.zeros((MAX_CONFUSED_CLASSES + 2,) * 2, np.int64)
        np.add.at(merged, (group[:, None], group[None, :]), counts)
        note = (
            f"<p>Of {len(names)} classes the {MAX_CONFUSED_CLASSES} that are confused with others most often are "
            f"shown; the other {len(names) - MAX_CONFUSED_CLASSES} are added up, right and wrong ones.</p>"
        )
        names = [*(names[place] for place in chosen), f"{len(names) - MAX_CONFUSED_CLASSES} others"]
        counts = merged
    head = ("true class", *(f"<span>{escape(name)}</span>" for name in (*names, "not found")))
    rows = []
    for row, name in enumerate((*names, "left over")):
        total = int(counts[row].sum())
        cells = [_shaded(int(count), total) for count in counts[row]]
        if row == len(names):
            cells[-1] = ""
        rows.append((escape(name), *cells))
    return note + table(head, rows, "confusion")


def reliability_chart(reliability: Reliability) -> str:
    """Share of right detections over their mean score, above the number of detections with such a score."""
    plot, low_plot = 180, _PLOT_HEIGHT - 180 - 26
    peak = round_up(max([1, *(entry.num_detections for entry in reliability.bins)]))
    parts = [grid(1, _LEFT, _WIDTH - _RIGHT, _TOP, plot), _x_ticks(), text(_x(0.5), _HEIGHT - 8, "score", "middle")]
    parts.append(text(0, 13, "share that is right", "start"))
    parts.append(_line([(0, 0), (1, 1)], 'class="limit"', "a score that means what it says", plot))
    floor_px = _HEIGHT - _BOTTOM
    parts.append(text(_LEFT - 6, floor_px - low_plot + 8, f"{peak:,g}", "end"))
    known = []
    for entry in reliability.bins:
        title = f"scores {entry.low:g} to {entry.high:g}: {entry.num_detections:,} detections"
        height = low_plot * entry.num_detections / peak
        # One detection among thousands must still be seen.
        height = max(height, 1.0) if entry.num_detections else 0.0
        parts.append(
            f'<rect x="{_x(entry.low) + 1:.1f}" y="{floor_px - height:.1f}" '
            f'width="{max(_x(entry.high) - _x(entry.low) - 2, 1):.1f}" '
            f'height="{height:.1f}" fill="{_SECOND_INK}"><title>{title}</title></rect>'
        )
        if entry.mean_score is not None and entry.precision is not None:
            known.append((entry.mean_score, entry.precision, f"{title}, {entry.precision:.3f} of them right"))
    parts.append(_line([(x, y) for x, y, _ in known], f'stroke="{_INK}" stroke-width="2"', "", plot))
    parts += [_dot(x, y, title, plot) for x, y, title in known]
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor_px}" y2="{floor_px}" class="grid"/>')
    if not known:
        parts.append(_said("no detections"))
    error = _number(reliability.expected_calibration_error)
    legend = [
        _line_swatch("share that is right", _INK, ""),
        _line_swatch("a score that means what it says", "#57606a", "3 3"),
        swatch("detections", _SECOND_INK),
    ]
    return svg(_WIDTH, _HEIGHT, parts, f"Reliability of scores: mean gap {error}") + _legend(legend)


def inspection_chart(inspection: Inspection) -> str:
    """Escape rate over overkill rate for all thresholds, the operating point marked; both must be measurable."""
    known = [
        (point.overkill_rate, point.escape_rate, point.threshold)
        for point in (*inspection.curve, inspection.at_operating_point)
        if point.overkill_rate is not None and point.escape_rate is not None
    ]
    known.sort(key=lambda point: (point[2], -point[1]))
    parts = [_unit_grid("overkill rate: good images in which something is reported", "escape rate")]
    parts.append(_line([(x, y) for x, y, _ in known], f'stroke="{_INK}" stroke-width="2"', ""))
    parts += [
        _dot(x, y, f"threshold {threshold:.3f}: escape {y:.3f}, overkill {x:.3f}", radius=2.5)
        for x, y, threshold in known
    ]
    here, title = inspection.at_operating_point, "Escape rate over overkill rate"
    if here.overkill_rate is not None and here.escape_rate is not None:
        words = f"threshold {here.threshold:.3f}: escape {here.escape_rate:.3f}, overkill {here.overkill_rate:.3f}"
        x, y = _x(here.overkill_rate), _y(here.escape_rate)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="{_SECOND_INK}" stroke="#000" stroke-width="2">'
            f"<title>operating point, {words}</title></circle>"
        )
        title += f"; operating point, {words}"
    legend = [_line_swatch("all thresholds", _INK, ""), swatch("operating point", _SECOND_INK)]
    return svg(_WIDTH, _HEIGHT, parts, title) + _legend(legend)


def shaded(share: float, content: str) -> str:
    """The content of a cell on a blue that is the darker the greater its share, 0..1."""
    # Even the darkest leaves black letters a contrast above 4.5.
    return f'<span class="shade" style="background:rgba(0,114,178,{0.6 * share:.3f})">{content}</span>'


def _shaded(count: int, total: int) -> str:
    return shaded(count / total, f"{count:,}") if count else ""


def _x(share: float) -> float:
    return _LEFT + share * _PLOT_WIDTH


def _y(share: float, plot: float = _PLOT_HEIGHT) -> float:
    return _TOP + (1 - share) * plot


def _unit_grid(x_title: str, y_title: str) -> str:
    """Both axes from 0 to 1."""
    return (
        grid(1, _LEFT, _WIDTH - _RIGHT, _TOP, _PLOT_HEIGHT)
        + _x_ticks()
        + text(_x(0.5), _HEIGHT - 8, x_title, "middle")
        + text(0, 13, y_title, "start")
    )


def _x_ticks() -> str:
    return "".join(text(_x(tick / 4), _HEIGHT - 28, f"{tick / 4:g}", "middle") for tick in range(5))


def _line(points: Iterable[tuple[float, float]], style: str, title: str, plot: float = _PLOT_HEIGHT) -> str:
    path = " ".join(f"{_x(x):.1f},{_y(y, plot):.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" {style}><title>{escape(title)}</title></polyline>'


def _dot(x: float, y: float, title: str, plot: float = _PLOT_HEIGHT, radius: float = 4) -> str:
    return (
        f'<circle cx="{_x(x):.1f}" cy="{_y(y, plot):.1f}" r="{radius}" fill="{_INK}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _said(words: str) -> str:
    return text(_x(0.5), _y(0.5), words, "middle")


def _line_swatch(name: str, colour: str, dashes: str) -> str:
    line = f'<line x1="0" x2="26" y1="5" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    return f'<span class="swatch"><svg class="sample" width="26" height="10">{line}</svg>{escape(name)}</span>'


def _legend(entries: Sequence[str]) -> str:
    return f'<p class="legend">{" ".join(entries)}</p>'


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"

"""Pictures of a run: training curves, precision-recall curves, and a contact sheet of predictions.

matplotlib is imported inside the functions, and only its `Figure`: no backend is chosen, no global state touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data.colours import PALETTE, class_colour
from evaluation.ignore import IgnoreRule
from evaluation.matching import ImageMatches, match
from evaluation.outcomes import RECALL_POINTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE_STYLES = ("-", "--", "-.", ":")
_MAX_NAMED_CLASSES = 28

_DPI = 100
_PANEL_PX = 640
_GAP_PX = 16
_CAPTION_PX = 34
_HEADER_PX = 84
_LEGEND_ENTRY_PX = (190, 34)
_MIN_WHOLE_ZOOM, _MAX_ZOOM = 2.0, 3.0
_LEGIBLE_PX = 32


def pr_plot(precision_at_50: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Write precision over recall at IoU .50 as PNG: a line per class, best first, and their mean in black.

    `precision_at_50` is that of `evaluation.score.Score`: by class name, float64 (101,).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), dpi=140, layout="constrained")
    axes: Axes = figure.add_subplot()
    order = list(precision_at_50)
    by_ap = sorted(order, key=lambda name: -float(precision_at_50[name].mean()))
    for rank, name in enumerate(by_ap):
        index = order.index(name)
        axes.plot(
            RECALL_POINTS, precision_at_50[name], color=class_colour(index), linewidth=1.6,
            linestyle=_LINE_STYLES[index // len(PALETTE) % len(_LINE_STYLES)],
            label=f"{precision_at_50[name].mean():.3f}  {_plain(name)}" if rank < _MAX_NAMED_CLASSES else None,
        )  # fmt: skip
    if by_ap:
        mean = np.mean([precision_at_50[name] for name in by_ap], axis=0)
        axes.plot(RECALL_POINTS, mean, color="black", linewidth=2.6, label=f"{mean.mean():.3f}  mean of classes")
        more = len(by_ap) - _MAX_NAMED_CLASSES
        title = "AP50" + (f" ({more} more classes not named)" if more > 0 else "")
        axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8,
                    alignment="left")  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no ground truth", ha="center", va="center", color="0.4")
    axes.set(xlabel="recall", ylabel="precision", title="Precision and recall at IoU .50", xlim=(0, 1), ylim=(0, 1.02))
    _calm(axes)
    figure.savefig(path)


def training_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write loss terms and validation AP by epoch as PNG, one above the other.

    `rows`: one mapping per reported epoch with `epoch`, `train/loss`, `train/loss_<term>` and, where that epoch was
    validated, `val/coco/AP...`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.5, 6.5), dpi=140, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    names = sorted({name for row in rows for name in row})
    terms = [name for name in names if name.startswith("train/loss_")]
    scores = [name for name in ("val/coco/AP", "val/coco/AP50", "val/coco/AP75", "val/coco/AP_small") if name in names]
    for axes, total, others in ((above, "train/loss", terms), (below, "val/coco/AP", scores)):
        for index, name in enumerate([total, *(name for name in others if name != total)]):
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                epochs, values = zip(*points, strict=True)
                label = name.removeprefix("train/loss_").removeprefix("train/").removeprefix("val/")
                axes.plot(epochs, values, marker="o", markersize=3, label=f"{label}  {values[-1]:.3f}",
                          color="black" if name == total else PALETTE[(index - 1) % len(PALETTE)],
                          linewidth=2.2 if name == total else 1.4)  # fmt: skip
        if axes.lines:
            axes.legend(title="last value", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8,
                        alignment="left")  # fmt: skip
        _calm(axes)
    best = max((row for row in rows if "val/coco/AP" in row), key=lambda row: row["val/coco/AP"], default=None)
    if best is not None:
        below.axvline(best["epoch"], color="0.6", linewidth=1, linestyle=":")
        below.set_title(f"validation: best AP {best['val/coco/AP']:.3f} at epoch {best['epoch']:.0f}", fontsize=10)
    above.set_title("training loss: total and weighted terms, mean of each epoch", fontsize=10)
    above.set_ylim(bottom=0)
    below.set(xlabel="epoch", ylim=(0, None))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)


def predictions_page(
    images_folder: Path,
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    ignore_rule: IgnoreRule,
    num_images: int = 12,
    score_threshold: float = 0.3,
) -> None:
    """Write one JPEG: ground truth beside predictions for images spread evenly from the best to the worst F1.

    Outcomes are those of `evaluation.matching.match`. Pixels are enlarged up to three times, so that small objects are
    legible; of an image too large for that, the window with the most outcomes, errors counting double, is shown.

    Raises:
        FileNotFoundError: an image is missing or cannot be decoded.
    """
    from matplotlib.figure import Figure

    matches = match(ground_truth, detections, ignore_rule=ignore_rule, score_threshold=score_threshold)
    chosen = _spread(matches, num_images)
    images = {image["id"]: image for image in ground_truth["images"]}
    class_index = {category["id"]: i for i, category in enumerate(ground_truth["categories"])}
    num_columns = min(2, max(1, len(chosen)))
    width_px = num_columns * (2 * _PANEL_PX + 3 * _GAP_PX)
    named = ground_truth["categories"][:_MAX_NAMED_CLASSES]
    num_legend_columns = width_px // _LEGEND_ENTRY_PX[0]
    header_px = _HEADER_PX + math.ceil(len(named) / num_legend_columns) * _LEGEND_ENTRY_PX[1]
    row_px = _CAPTION_PX + _PANEL_PX + _GAP_PX
    height_px = header_px + math.ceil(len(chosen) / num_columns) * row_px
    figure = Figure(figsize=(width_px / _DPI, height_px / _DPI), dpi=_DPI)
    _header(figure, [category["name"] for category in named], num_legend_columns, score_threshold)
    for place, found in enumerate(chosen):
        image = images[found.image_id]
        pixels = cv2.imread(str(images_folder / image["file_name"]))
        if pixels is None:
            raise FileNotFoundError(f"{images_folder / image['file_name']} is missing or is not an image")
        marks = _marks(found, ground_truth["annotations"], detections, class_index)
        view = _view(pixels.shape[1], pixels.shape[0], marks.truth + marks.predicted)
        left_px = _GAP_PX + place % num_columns * (2 * _PANEL_PX + 3 * _GAP_PX)
        top_px = header_px + place // num_columns * row_px
        outcome = f"{len(found.hits)} found, {len(found.misses)} missed, {len(found.false_positives)} false"
        caption = f"{_plain(image['file_name'])}    F1 {found.f1 or 0.0:.2f}    {outcome}    {view.text}"
        figure.text(left_px / width_px, 1 - (top_px + 0.6 * _CAPTION_PX) / height_px, caption, fontsize=12, va="center")
        for side, boxes in enumerate((marks.truth, marks.predicted)):
            x_px, y_px = left_px + side * (_PANEL_PX + _GAP_PX), top_px + _CAPTION_PX
            # As figure image, not in the axes: put down pixel by pixel instead of being resampled.
            enlarged = view.cut(pixels)
            h_px, w_px = enlarged.shape[:2]
            figure.figimage(enlarged, x_px, height_px - y_px - h_px, origin="upper", zorder=-1)
            axes = figure.add_axes((x_px / width_px, 1 - (y_px + h_px) / height_px, w_px / width_px, h_px / height_px))
            _draw(axes, view, boxes, image.get("ignore_regions_xywh") or [])
    # Noise hardly compresses: a higher level costs seconds and saves a tenth.
    # Noisy pictures at twice their size: as PNG the page would be ten times as large.
    figure.savefig(path, pil_kwargs={"quality": 90})


class _Mark(NamedTuple):
    """One box to draw; `outcome` is hit, miss, false or ignored."""

    box_xywh_px: Sequence[float]
    outcome: str
    colour: str


class _Marks(NamedTuple):
    truth: list[_Mark]
    predicted: list[_Mark]


class _View(NamedTuple):
    """Window of an image in its pixels, and the enlargement."""

    left_px: int
    top_px: int
    width_px: int
    height_px: int
    zoom: float
    text: str

    def cut(self, pixels_bgr: NDArray[Any]) -> NDArray[Any]:
        """The window, enlarged, in RGB."""
        rows = slice(self.top_px, self.top_px + self.height_px)
        columns = slice(self.left_px, self.left_px + self.width_px)
        window = cv2.cvtColor(pixels_bgr[rows, columns], cv2.COLOR_BGR2RGB)
        return cv2.resize(window, None, fx=self.zoom, fy=self.zoom, interpolation=cv2.INTER_CUBIC)


def _spread(matches: Sequence[ImageMatches], num_images: int) -> list[ImageMatches]:
    informative = [found for found in matches if found.f1 is not None] or list(matches)
    ranked = sorted(informative, key=lambda found: (-(found.f1 or 0.0), found.image_id))
    places = np.unique(np.linspace(0, len(ranked) - 1, min(num_images, len(ranked))).round().astype(int))
    return [ranked[place] for place in places]


def _marks(
    found: ImageMatches,
    annotations: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    class_index: Mapping[int, int],
) -> _Marks:
    def marks(boxes: Sequence[Mapping[str, Any]], rows: Iterable[int], outcome: str) -> list[_Mark]:
        return [
            _Mark(boxes[row]["bbox"], outcome, class_colour(class_index[boxes[row]["category_id"]])) for row in rows
        ]

    return _Marks(
        truth=marks(annotations, found.ignored_annotations, "ignored")
        + marks(annotations, [row for row, _ in found.hits], "hit")
        + marks(annotations, found.misses, "miss"),
        predicted=marks(detections, found.ignored_detections, "ignored")
        + marks(detections, [row for _, row in found.hits], "hit")
        + marks(detections, found.false_positives, "false"),
    )


def _view(width_px: int, height_px: int, marks: Sequence[_Mark]) -> _View:
    boxes = np.array([mark.box_xywh_px for mark in marks], dtype=np.float64).reshape(-1, 4)
    zoom = _PANEL_PX / max(width_px, height_px)
    if zoom < _MIN_WHOLE_ZOOM and marks:
        zoom = max(zoom, _LEGIBLE_PX / float(np.quantile(np.sqrt(boxes[:, 2] * boxes[:, 3]), 0.25)))
    zoom = min(max(zoom, 1.0), _MAX_ZOOM)
    side_px = int(_PANEL_PX / zoom)
    w_px, h_px = min(width_px, side_px), min(height_px, side_px)
    if (w_px, h_px) == (width_px, height_px) or not marks:
        return _View(0, 0, w_px, h_px, zoom, "")
    weights = np.array([{"hit": 1.0, "ignored": 0.0}.get(mark.outcome, 2.0) for mark in marks])
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    corners = (centres - [w_px / 2, h_px / 2]).clip(0, [width_px - w_px, height_px - h_px]).astype(int)
    inside = ((centres >= corners[:, None]) & (centres <= corners[:, None] + [w_px, h_px])).all(axis=2)
    left_px, top_px = corners[int((inside @ weights).argmax())].tolist()
    return _View(
        left_px, top_px, w_px, h_px, zoom, f"window {w_px}x{h_px} at ({left_px}, {top_px}) of {width_px}x{height_px}"
    )


def _draw(axes: Axes, view: _View, marks: Sequence[_Mark], regions_xywh: Iterable[Sequence[float]]) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    axes.patch.set_visible(False)
    for x, y, w, h in regions_xywh:
        axes.add_patch(
            Rectangle((x, y), w, h, facecolor=(0, 0, 0, 0.3), edgecolor=(1, 1, 1, 0.7), hatch="//", linewidth=1)
        )
    for outcome in ("ignored", "hit", "miss", "false"):
        chosen = [mark for mark in marks if mark.outcome == outcome]
        outlines = [_outline(mark.box_xywh_px) for mark in chosen]
        colours = ["0.75" if outcome == "ignored" else mark.colour for mark in chosen]
        axes.add_collection(LineCollection(outlines, colors="black", linewidths=2.6, alpha=0.6))
        dashes: Any = "solid" if outcome == "hit" else (0, (2, 1))
        axes.add_collection(LineCollection(outlines, colors=colours, linewidths=1.5, linestyles=dashes))
        if marker := {"miss": "o", "false": "x"}.get(outcome):
            boxes = np.array([mark.box_xywh_px for mark in chosen]).reshape(-1, 4)
            for colour, width in (("black", 3.6), ("white", 1.6)):
                axes.plot(
                    boxes[:, 0] + boxes[:, 2], boxes[:, 1], linestyle="none", marker=marker, markersize=7,
                    markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width,
                )  # fmt: skip
    axes.set(xlim=(view.left_px, view.left_px + view.width_px), ylim=(view.top_px + view.height_px, view.top_px),
             xticks=[], yticks=[])  # fmt: skip


def _outline(box_xywh_px: Sequence[float]) -> NDArray[np.float64]:
    x, y, w, h = box_xywh_px
    return np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)])


def _header(figure: Figure, class_names: Sequence[str], num_columns: int, score_threshold: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width_px, height_px = figure.get_size_inches() * _DPI
    figure.text(
        _GAP_PX / width_px, 1 - 24 / height_px,
        f"Left: ground truth. Right: detections with a score of at least {score_threshold:g}. From best to worst F1, "
        "matched at IoU .50.", fontsize=15, va="center",
    )  # fmt: skip
    error: dict[str, Any] = {"color": "0.35", "linewidth": 2, "linestyle": (0, (2, 1)), "markerfacecolor": "white"}
    outcomes = [
        Line2D([], [], color="0.35", linewidth=2, label="found"),
        Line2D([], [], **error, marker="o", markersize=8, markeredgewidth=2, label="missed"),
        Line2D([], [], **error, marker="x", markersize=8, markeredgewidth=2, label="false positive"),
        Line2D([], [], **{**error, "color": "0.75"}, label="not scored"),
        Patch(facecolor="0.7", edgecolor="white", hatch="//", label="ignore region"),
    ]
    classes = [Patch(color=class_colour(index), label=_plain(name)) for index, name in enumerate(class_names)]
    for handles, top_px in ((outcomes, 38), (classes, 38 + _LEGEND_ENTRY_PX[1])):
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - top_px / height_px), ncols=num_columns,
            frameon=False, fontsize=13, handlelength=2.6, columnspacing=1.6, borderaxespad=0.4,
        )  # fmt: skip


def _plain(text: str) -> str:
    # matplotlib would set what stands between two dollar signs as a formula.
    return text.replace("$", r"\$")


def _calm(axes: Any) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

"""Curves of a run as PNG: training by epoch, precision over recall.

matplotlib is imported inside the functions, and only its `Figure`: no backend is chosen, no global state touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.colours import PALETTE, class_colour
from evaluation.outcomes import RECALL_POINTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE_STYLES = ("-", "--", "-.", ":")
_MAX_NAMED_CLASSES = 28


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
            label=f"{precision_at_50[name].mean():.3f}  {plain(name)}" if rank < _MAX_NAMED_CLASSES else None,
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


def plain(text: str) -> str:
    """Text that matplotlib sets as it stands: what is between two dollar signs would become a formula."""
    return text.replace("$", r"\$")


def _calm(axes: Any) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

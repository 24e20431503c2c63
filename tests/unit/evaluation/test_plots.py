"""Plots are checked by the colours that must be visible in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pixels import pixels_of

from data.colours import PALETTE, class_colour
from evaluation.plots import pr_plot, training_curves


def test_pr_plot_has_a_line_per_class(tmp_path: Path) -> None:
    curves = {"car": np.linspace(1, 0, 101), "$no{formula$": np.where(np.linspace(0, 1, 101) < 0.5, 0.8, 0.0)}
    pr_plot(curves, tmp_path / "two.png")
    pr_plot({"car": curves["car"]}, tmp_path / "one.png")
    pr_plot({}, tmp_path / "none.png")
    assert pixels_of(tmp_path / "two.png", class_colour(0)) > 500
    assert pixels_of(tmp_path / "two.png", class_colour(1)) > 500
    assert pixels_of(tmp_path / "one.png", class_colour(1)) == 0
    assert pixels_of(tmp_path / "none.png", class_colour(0)) == 0


def test_training_curves_of_a_run_that_validates_every_other_epoch(tmp_path: Path) -> None:
    rows = [{"epoch": e, "train/loss": 3 / e, "train/loss_box": 2 / e, "train/loss_class": 1 / e} for e in range(1, 7)]
    training_curves(rows, tmp_path / "losses.png")
    training_curves([{**r, "val/coco/AP": 0.1 * r["epoch"], "val/coco/AP50": 0.15 * r["epoch"]} if r["epoch"] % 2 else r
                     for r in rows], tmp_path / "both.png")  # fmt: skip
    training_curves([], tmp_path / "nothing.png")
    assert pixels_of(tmp_path / "losses.png", PALETTE[1]) > 300
    assert pixels_of(tmp_path / "both.png", PALETTE[0]) > pixels_of(tmp_path / "losses.png", PALETTE[0]) + 300
    assert pixels_of(tmp_path / "nothing.png", PALETTE[0]) == 0

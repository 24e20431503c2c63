"""The picture is checked by what must be visible in it: marks of each outcome where they belong, and its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from data.colours import PALETTE
from evaluation.foreground import ForegroundReport, ObjectScore, foreground_report
from evaluation.foreground_chart import foreground_chart

FOUND, MISSED = PALETTE[5], PALETTE[3]


def report(missed: list[tuple[float, float]], found: list[tuple[float, float]]) -> ForegroundReport:
    rows = [ObjectScore(i, *row) for i, row in enumerate(missed + found)]
    return foreground_report(
        rows,
        [{"id": row.annotation_id, "bbox": [0, 0, 8, 8]} for row in rows],
        missed=set(range(len(missed))),
        found=set(range(len(missed), len(rows))),
        score_threshold=0.3,
    )


def coloured(path: Path, colour: str) -> Any:
    """Rows and columns of the pixels of about this `#rrggbb` colour, half transparent on white or not."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (5, 3, 1)])
    pixels = cv2.imread(str(path)).astype(int)
    near = [np.abs(pixels - shade).max(axis=2) <= 24 for shade in (wanted, (wanted + 255) / 2)]
    return np.argwhere(near[0] | near[1])


@pytest.fixture
def artists(monkeypatch: pytest.MonkeyPatch) -> list[Artist]:
    """Everything in every figure that is saved."""
    found: list[Artist] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        found.extend(figure.findobj())
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def texts(artists: list[Artist]) -> set[str]:
    return {artist.get_text() for artist in artists if isinstance(artist, Text)}


def test_missed_and_found_stand_where_their_scores_are(tmp_path: Path) -> None:
    """Against the same picture with the clouds in each other's place."""
    low, high = [(0.2, 0.9)] * 40, [(0.9, 0.2)] * 40
    middles = {}
    for name, made in (("one", report(low, high)), ("other", report(high, low))):
        foreground_chart(made, tmp_path / f"{name}.png")
        middles[name] = [coloured(tmp_path / f"{name}.png", colour).mean(axis=0) for colour in (MISSED, FOUND)]
    (missed, found), (missed_other, found_other) = middles["one"], middles["other"]
    assert missed[0] < missed_other[0]
    assert missed[1] < missed_other[1]
    assert found[0] > found_other[0]
    assert found[1] > found_other[1]
    assert cv2.imread(str(tmp_path / "one.png")).shape == (1050, 1190, 3)


def test_outcomes_differ_in_their_markers_too(tmp_path: Path, artists: list[Artist]) -> None:
    foreground_chart(report([(0.2, 0.9)], [(0.9, 0.2)]), tmp_path / "chart.png")
    found, missed = (
        {len(one.get_paths()[0].vertices) for one in artists
         if isinstance(one, PathCollection) and to_hex(one.get_edgecolor()[0]).upper() == colour}
        for colour in (FOUND, MISSED)
    )  # fmt: skip
    assert len(found) == len(missed) == 1
    assert found != missed


def test_the_shares_are_written_into_the_corners_and_the_title(tmp_path: Path, artists: list[Artist]) -> None:
    foreground_chart(report([(0.1, 0.9)] * 3 + [(0.1, 0.1)], [(0.9, 0.9)] * 2), tmp_path / "chart.png")
    shares = {"75% of missed", "25% of missed", "100% of found"}
    assert shares | {"missed (4)", "found (2)", "score 0.300"} <= texts(artists)
    assert any(text.startswith("4 of 6 objects are missed, 75% of these") for text in texts(artists))


def test_points_that_are_not_drawn_are_counted(
    tmp_path: Path, artists: list[Artist], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.foreground.MAX_POINTS", 10)
    foreground_chart(report([(0.1, 0.9)] * 30, []), tmp_path / "chart.png")
    assert any(text.endswith("20 points not drawn") for text in texts(artists))
    assert "missed (30)" in texts(artists)


@pytest.mark.parametrize(("found", "title"), [([], "No ground truth"), ([(0.9, 0.9)], "None of 1 objects is missed")])
def test_a_chart_of_nothing_missed(
    tmp_path: Path, artists: list[Artist], found: list[tuple[float, float]], title: str
) -> None:
    foreground_chart(report([], found), tmp_path / "chart.png")
    assert title in texts(artists)
    assert len(coloured(tmp_path / "chart.png", MISSED)) < 200, "the legend alone"

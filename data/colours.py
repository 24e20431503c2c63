"""The colours of classes, the same in every picture and chart."""

from __future__ import annotations

# Okabe and Ito 2008: eight colours told apart under all common kinds of colour blindness; black is kept for means.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")


def class_colour(index: int) -> str:
    """Colour of a class by its place among the categories."""
    return PALETTE[index % len(PALETTE)]

"""Charts of a dataset's report as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

from data.colours import PALETTE
from data.page import grid, round_up, svg, swatch, text
from data.statistics import AITOD_SIDES_PX, COCO_SIDES_PX, SIDE_EDGES_PX

_INK = "#0072B2"
# From what is hardest to find to what is easiest; told apart in grey and under colour blindness.
_BUCKET_COLOURS = ("#67001F", "#B2182B", "#EF8A62", "#FDDBC7", "#92C5DE", "#2166AC")
_WIDTH = 1080


def size_histogram(sides: Sequence[int]) -> str:
    """Objects by sqrt(area) in half octaves; the fill tells AI-TOD's buckets, dashed lines stand at COCO's limits."""
    width, height, left, top, bottom = _WIDTH, 260, 52, 26, 46
    step = (width - left - 8) / len(sides)
    peak = round_up(max(*sides, 1))
    plot = height - top - bottom
    parts = [grid(peak, left, width - 8, top, plot)]
    lows = (0.0, *SIDE_EDGES_PX)
    for number, count in enumerate(sides):
        x, h = left + number * step, plot * count / peak
        last = number == len(sides) - 1
        span = f"{lows[number]:g} px and more" if last else f"{lows[number]:g} to {lows[number + 1]:g} px"
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{top + plot - h:.1f}" width="{step - 2:.1f}" height="{h:.1f}" '
            f'fill="{_bucket_colour(lows[number])}"><title>{span}: {count}</title></rect>'
        )
        if not number % 2:
            parts.append(text(x, height - 26, f"{lows[number]:g}" if number else "0", "middle"))
    for name, limit_px in list(COCO_SIDES_PX.items())[:-1]:
        x = left + step * (2 * log2(limit_px))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{top + plot}" class="limit"/>')
        parts.append(text(x - 4, top - 10, f"COCO {name}", "end"))
    parts.append(text(x + 4, top - 10, "large", "start"))
    parts.append(text(left + (width - left) / 2, height - 6, "sqrt(area), px", "middle"))
    return svg(width, height, parts, "Objects by size")


def size_legend() -> str:
    """The colours of AI-TOD's buckets."""
    entries = zip(AITOD_SIDES_PX, _BUCKET_COLOURS, strict=True)
    return '<p class="legend">' + " ".join(swatch(name, colour) for name, colour in entries) + "</p>"


def objects_histogram(images_by_objects: Mapping[str, Mapping[int, int]]) -> str:
    """Share of each split's images by number of objects, in bins that double."""
    largest = max((count for split in images_by_objects.values() for count in split), default=0)
    bins = [(0, 0), (1, 1)]
    while bins[-1][1] < largest:
        bins.append((bins[-1][1] + 1, 2 * bins[-1][1]))
    width, height, left, top, bottom = _WIDTH, 230, 52, 12, 46
    plot = height - top - bottom
    shares = {
        split: [
            sum(images for count, images in counts.items() if low <= count <= high) / max(sum(counts.values()), 1)
            for low, high in bins
        ]
        for split, counts in images_by_objects.items()
    }
    peak = round_up(100 * max(max(values) for values in shares.values())) / 100
    step = (width - left - 8) / len(bins)
    inner = (step - 6) / len(shares)
    parts = [grid(100 * peak, left, width - 8, top, plot, "%")]
    for number, (low, high) in enumerate(bins):
        x = left + number * step
        span = f"{low}" if low == high else f"{low}–{high}"
        for place, (split, values) in enumerate(shares.items()):
            h = plot * values[number] / peak
            parts.append(
                f'<rect x="{x + 3 + place * inner:.1f}" y="{top + plot - h:.1f}" width="{inner:.1f}" height="{h:.1f}" '
                f'fill="{PALETTE[place]}"><title>{escape(split)}, {span} objects: {values[number]:.1%} of the images'
                "</title></rect>"
            )
        parts.append(text(x + step / 2, height - 26, span, "middle"))
    parts.append(text(left + (width - left) / 2, height - 6, "objects in an image", "middle"))
    legend = " ".join(swatch(split, PALETTE[place]) for place, split in enumerate(shares))
    return svg(width, height, parts, "Images by number of objects") + f'<p class="legend">{legend}</p>'


def heat_map(cells: Sequence[Sequence[int]]) -> str:
    """Objects by the place of their centre, relative to the image; the fullest cell is darkest."""
    peak = max(1, *map(max, cells))
    side = 14
    parts = [
        f'<rect x="{column * side}" y="{row * side}" width="{side}" height="{side}" fill="{_INK}" '
        f'fill-opacity="{count / peak:.3f}"><title>{count} objects</title></rect>'
        for row, counts in enumerate(cells)
        for column, count in enumerate(counts)
        if count
    ]
    size = side * len(cells)
    parts.append(f'<rect width="{size}" height="{size}" class="frame"/>')
    return svg(size, size, parts, "Where the centres of objects lie")


def _bucket_colour(low_px: float) -> str:
    for limit_px, colour in zip(AITOD_SIDES_PX.values(), _BUCKET_COLOURS, strict=True):
        if low_px < limit_px:
            return colour
    raise AssertionError("the last bucket has no limit")

"""`write_comparison`: two runs side by side on the images where they differ most, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from data.decode import read_bgr
from data.page import document, table
from evaluation.error_pictures import enlarged, legend, marks_of, shown_zoom, whole
from evaluation.ignore import IgnoreRule
from evaluation.matching import ImageMatches, match
from evaluation.report_page import STYLE, class_names
from evaluation.significance import Comparison, Difference

_SHOWN_PX = 540


class Side(NamedTuple):
    """One of the two runs: its name, its detections in COCO form, and the score from which they count."""

    name: str
    detections: Sequence[Mapping[str, Any]]
    score_threshold: float


class _Difference(NamedTuple):
    """Objects of an image, as rows of the annotations, that only one of the two found, and what each has to show."""

    matches: tuple[ImageMatches, ImageMatches]
    found_by_one: tuple[set[int], set[int]]

    @property
    def size(self) -> int:
        a, b = self.matches
        return sum(map(len, self.found_by_one)) + abs(len(a.false_positives) - len(b.false_positives))


def write_comparison(
    path: Path,
    images_folder: Path,
    ground_truth: Mapping[str, Any],
    sides: tuple[Side, Side],
    *,
    scored_on: str,
    ignore_rule: IgnoreRule,
    comparison: Comparison,
    notes: Sequence[str],
    facts: Mapping[str, Sequence[tuple[str, str, str]]],
    num_images: int = 12,
) -> None:
    """Write the page, with the tables of a `comparison` of the two. `scored_on`: dataset, version and split.

    `notes`: what must be known to read the tables, of the samples above all. `facts`: by kind, what something is in
    each run.

    Images are ordered by objects that only one run found plus the gap in false positives.

    Raises:
        BadGroundTruth, BadDetections: see `evaluation.checks`.
        FileNotFoundError: a picture that is drawn is missing.
        UndecodableImage: it is damaged.
    """
    differences = _differences(ground_truth, sides, ignore_rule)
    shown = sorted(
        (difference for difference in differences if difference.size),
        key=lambda difference: (-difference.size, difference.matches[0].image_id),
    )[:num_images]
    title = f"{sides[0].name} and {sides[1].name}"
    images = {image["id"]: image for image in ground_truth["images"]}
    pictures = "".join(
        _picture(difference, images[difference.matches[0].image_id], images_folder, ground_truth, sides)
        for difference in shown
    )
    reading = (
        f"<p>{len(shown)} of {len(differences):,} images. First come those with most objects that only one of the two "
        "found, plus the gap in false positives. Enlarged are the smallest objects that one missed and the other "
        f"found.</p>{legend()}"
    )
    of_classes = {f"{label}: {name}": d for label, row in comparison.per_class.items() for name, d in row.items()}
    sections = {
        "Metrics": _differences_table(comparison.metrics, comparison.confidence, sides) + _reading(notes),
        **({"Classes": _differences_table(of_classes, comparison.confidence, sides)} if of_classes else {}),
        **{kind.capitalize(): _facts_table(found, sides) for kind, found in facts.items()},
        "Objects": _totals(differences, sides),
        "Where they differ": reading + pictures if shown else "<p>No image has another outcome.</p>",
    }
    header = f"<h1>{escape(title)}</h1><p><code>{escape(scored_on)}</code></p>"
    page = document(title, header, sections, STYLE.read_text(encoding="utf-8"))
    path.write_text(page, encoding="utf-8")


def _differences_table(differences: Mapping[str, Difference], confidence: float, sides: tuple[Side, Side]) -> str:
    a, b = (escape(side.name) for side in sides)
    rows = [
        (
            escape(name), f"{found.first:.3f}", f"{found.second:.3f}", f"{found.difference:+.3f}",
            f"{found.low:+.3f} to {found.high:+.3f}", found.verdict or "",
        )
        for name, found in differences.items()
        if found.first is not None and found.second is not None and found.difference is not None
        and found.low is not None and found.high is not None
    ]  # fmt: skip
    head = ("", a, b, "difference", f"{confidence:.0%} interval", "the second is")
    return f'<div class="scroll">{table(head, rows)}</div>'


def _facts_table(facts: Sequence[tuple[str, str, str]], sides: tuple[Side, Side]) -> str:
    if not facts:
        return "<p>They are the same.</p>"
    head = ("", *(escape(side.name) for side in sides))
    rows = [tuple(escape(cell) for cell in fact) for fact in facts]
    return f'<div class="scroll">{table(head, rows)}</div>'


def _reading(notes: Sequence[str]) -> str:
    words = (
        "Paired bootstrap: both are scored on the same samples. The interval holds the differences that other "
        "pictures of the same kind would give."
    )
    return "".join(f'<p class="reading">{escape(note)}</p>' for note in (words, *notes))


def _differences(
    ground_truth: Mapping[str, Any], sides: tuple[Side, Side], ignore_rule: IgnoreRule
) -> list[_Difference]:
    of_a, of_b = (
        match(ground_truth, side.detections, ignore_rule=ignore_rule, score_threshold=side.score_threshold)
        for side in sides
    )
    differences = []
    for a, b in zip(of_a, of_b, strict=True):
        by_a, by_b = ({row for row, _ in found.hits} for found in (a, b))
        differences.append(_Difference((a, b), (by_a - by_b, by_b - by_a)))
    return differences


def _totals(differences: Sequence[_Difference], sides: tuple[Side, Side]) -> str:
    only_a, only_b = (sum(len(difference.found_by_one[side]) for difference in differences) for side in (0, 1))
    both = sum(len(difference.matches[0].hits) for difference in differences) - only_a
    neither = sum(len(difference.matches[0].misses) for difference in differences) - only_b
    a, b = (escape(side.name) for side in sides)
    rows = [
        ("found by both", f"{both:,}"), (f"only by {a}", f"{only_a:,}"), (f"only by {b}", f"{only_b:,}"),
        ("by neither", f"{neither:,}"),
    ]  # fmt: skip
    rows += [
        (f"false positives of {escape(side.name)}, scores from {side.score_threshold:.3f}",
         f"{sum(len(difference.matches[place].false_positives) for difference in differences):,}")
        for place, side in enumerate(sides)
    ]  # fmt: skip
    return f'<div class="scroll">{table(("at IoU .50", ""), rows)}</div>'


def _picture(
    difference: _Difference,
    image: Mapping[str, Any],
    images_folder: Path,
    ground_truth: Mapping[str, Any],
    sides: tuple[Side, Side],
) -> str:
    annotations, names = ground_truth["annotations"], class_names(ground_truth)
    pixels = read_bgr(images_folder / image["file_name"])
    zoom = shown_zoom(pixels, _SHOWN_PX)
    views = []
    for place, (side, found) in enumerate(zip(sides, difference.matches, strict=True)):
        marks = marks_of(found, annotations, side.detections, names)
        outcome = f"{len(found.misses)} missed, {len(found.false_positives)} false positives, {len(found.hits)} found"
        only = len(difference.found_by_one[place])
        drawing = whole(
            pixels, marks, image.get("ignore_regions_xywh") or [], f"{side.name} on {image['file_name']}: {outcome}",
            _SHOWN_PX,
        )  # fmt: skip
        lost = [annotations[row] for row in sorted(difference.found_by_one[1 - place])]
        views.append(
            f"<div><figcaption><b>{escape(side.name)}</b> {outcome}; {only} of them by it alone</figcaption>{drawing}"
            f"{enlarged(pixels, marks, lost, names, zoom)}</div>"
        )
    height_px, width_px = pixels.shape[:2]
    return (
        f'<figure class="errorpicture"><figcaption>{escape(str(image["file_name"]))} · {width_px}x{height_px} px, '
        f'shown up to {zoom:.2g}x</figcaption><div class="sides">{"".join(views)}</div></figure>'
    )

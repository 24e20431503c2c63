"""`write_report`: all that is known of a run's score as one HTML file without script, link or network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from data.decode import read_bgr
from data.page import document, table
from evaluation.error_pictures import enlarged, legend, marks_of, shown_zoom, whole, worst
from evaluation.matching import match
from evaluation.report_sections import UNKNOWN, SplitReport, analysis_sections, count, number, of_protocols

STYLE = Path(__file__).parent / "report_page.css"
_SHOWN_PX = 800
_OPTIONS = {
    "score_threshold": "detections are kept from a score of",
    "nms_iou": "NMS at an IoU of",
    "max_detections": "detections of an image, at most",
    "max_candidates": "candidates before NMS, at most",
    "input_size_px": "input size, px",
    "precision": "arithmetic",
    "max_dets": "detections counted by the protocol, at most",
    "ignore_rule": "ignore rule",
    "tiling": "tiles",
}


class ExtraPicture(NamedTuple):
    """A picture that somebody else has drawn, PNG, and a sentence that says what it shows."""

    title: str
    png: bytes
    caption: str


def write_report(
    path: Path,
    architecture: str,
    splits: Sequence[SplitReport],
    images_folder: Path,
    *,
    speed: Mapping[str, float] | None = None,
    extra_pictures: Sequence[ExtraPicture] = (),
    num_images: int = 12,
) -> None:
    """Write the report of a run's splits; the last one is the one that counts, and its worst images are drawn.

    `speed`: numbers by name, as measured when the model was evaluated. The same arguments give the same bytes.

    Raises:
        ValueError: no split.
        FileNotFoundError: a picture that is drawn is missing.
        UndecodableImage: it is damaged.
    """
    if not splits:
        raise ValueError("a report needs at least one scored split")
    last = splits[-1]
    result = last.result
    extra = f'<div class="figures">{"".join(map(_extra, extra_pictures))}</div>'
    sections = {
        "The number": _numbers(splits, speed),
        **analysis_sections(splits),
        **({"Foreground and class score": extra} if extra_pictures else {}),
        f"Worst images of {result.split}": _pictures(last, images_folder, num_images),
    }
    header = (
        f"<h1>{escape(architecture)} on {escape(result.dataset_name)}</h1>"
        f"<p><code>run {escape(result.run_key)} · dataset version {escape(result.dataset_version)} · "
        f"score {escape(result.score_key)}</code></p>"
    )
    title = f"{architecture} on {result.dataset_name}, run {result.run_key}"
    path.write_text(document(title, header, sections, STYLE.read_text(encoding="utf-8")), encoding="utf-8")


def _numbers(splits: Sequence[SplitReport], speed: Mapping[str, float] | None) -> str:
    last = splits[-1].result
    names = of_protocols(name for split in splits for name in split.result.metrics)
    first = next((name for name in names if name.startswith(f"{last.protocol}/")), None)
    lines = []
    if first is not None:
        lines.append(
            f'<p><span class="number">{number(last.metrics.get(first))}</span> {escape(first)} on {last.split}</p>'
        )
    lines.append(
        '<p class="reading">The part before the slash is the protocol. Two numbers compare only if protocol, dataset '
        f"version, split and options are the same. {UNKNOWN} stands for: nothing to score against.</p>"
    )
    head = [split.result.split for split in splits]
    metrics = [(escape(name), *(number(split.result.metrics.get(name)) for split in splits)) for name in names]
    options = [split.result.options.model_dump(mode="json") for split in splits]
    option_rows = [
        (escape(_OPTIONS.get(name, name.replace("_", " "))), *(_option(option.get(name)) for option in options))
        for name in dict.fromkeys(name for option in options for name in option)
    ]
    counts = [
        (
            escape(name.removeprefix("num_").replace("_", " ")),
            *(count(split.result.counts.get(name)) for split in splits),
        )
        for name in dict.fromkeys(name for split in splits for name in split.result.counts)
    ]
    speeds = [(escape(name.replace("_", " ")), f"{value:,.4g}") for name, value in (speed or {}).items()]
    left = table(("metric", *head), metrics) + (table(("speed", ""), speeds) if speeds else "")
    right = table(("computed under", *head), option_rows) + table(("counted, at all scores", *head), counts)
    return "".join(lines) + f'<div class="figures"><div>{left}</div><div>{right}</div></div>'


def _extra(extra: ExtraPicture) -> str:
    data = base64.b64encode(extra.png).decode()
    return (
        f'<figure><h3>{escape(extra.title)}</h3><img alt="{escape(extra.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(extra.caption)}</figcaption></figure>"
    )


def _pictures(split: SplitReport, images_folder: Path, num_images: int) -> str:
    threshold = split.analysis.operating_point.shown_score
    annotations = split.ground_truth["annotations"]
    names = class_names(split.ground_truth)
    images = {image["id"]: image for image in split.ground_truth["images"]}
    matches = match(
        split.ground_truth, split.detections,
        ignore_rule=split.result.options.ignore_rule, score_threshold=threshold,
    )  # fmt: skip
    shown = worst(matches, num_images)
    if not shown:
        return f"<p>No errors at a threshold of {threshold:.3f}.</p>"
    parts = [
        f"<p>{len(shown)} of {len(matches):,} images, those with most errors, misses and false positives together, at "
        f"a threshold of {threshold:.3f} and IoU .50. Beside them the smallest missed objects, enlarged.</p>",
        legend(),
    ]
    for found in shown:
        image = images[found.image_id]
        pixels = read_bgr(images_folder / image["file_name"])
        marks = marks_of(found, annotations, split.detections, names)
        outcome = f"{len(found.misses)} missed, {len(found.false_positives)} false positives, {len(found.hits)} found"
        height_px, width_px = pixels.shape[:2]
        zoom = shown_zoom(pixels, _SHOWN_PX)
        label = f"{image['file_name']}: {outcome}"
        drawing = whole(pixels, marks, image.get("ignore_regions_xywh") or [], label, _SHOWN_PX)
        beside = enlarged(pixels, marks, [annotations[row] for row in found.misses], names, zoom)
        parts.append(
            f'<figure class="errorpicture"><figcaption><b>{outcome}</b> · {escape(str(image["file_name"]))} · '
            f"{width_px}x{height_px} px, shown up to {zoom:.2g}x</figcaption>"
            f'<div class="beside">{drawing}{beside}</div></figure>'
        )
    return "".join(parts)


def class_names(ground_truth: Mapping[str, Any]) -> dict[int, str]:
    """Names by category id."""
    return {category["id"]: str(category["name"]) for category in ground_truth["categories"]}


def _option(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return escape(", ".join(f"{name.replace('_', ' ')} {part}" for name, part in value.items()))
    return escape(str(value))

"""The page of a dataset's report: one HTML file without script, link or network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from data.colours import class_colour
from data.page import bar, document, swatch, table
from data.records import ImageRecord
from data.report_charts import heat_map, objects_histogram, size_histogram, size_legend
from data.report_pictures import chosen, drawn

if TYPE_CHECKING:
    from data.report import DatasetReport
    from data.report_change import Change
    from data.statistics import SplitStatistics


def page(report: DatasetReport, images: Path, records: Mapping[str, Sequence[ImageRecord]]) -> str:
    """The report as HTML; every name in it is escaped."""
    splits = report.splits
    sections = {
        "Splits": _split_table(splits) + _tiling(splits),
        "Change": _change(report.change),
        "Classes": _class_table(report),
        "Sizes": _sizes(splits),
        "Objects per image": objects_histogram({name: split.images_by_objects for name, split in splits.items()}),
        "Where objects lie": _heat_maps(splits),
        "Pictures": _legend(report.classes)
        + "".join(_pictures(name, content, images, report.classes) for name, content in records.items()),
    }
    header = (
        f"<h1>{escape(report.name)}</h1><p><code>version {report.version}</code></p>"
        f"<p>{escape(report.description)}</p><p>Licence: {escape(report.licence)}</p>"
    )
    return document(f"{report.name} {report.version}", header, sections)


def _split_table(splits: Mapping[str, SplitStatistics]) -> str:
    rows = {
        "images": lambda split: f"{split.num_images:,}",
        "of them without objects": lambda split: _part(split.num_images_without_objects, split.num_images),
        "objects": lambda split: f"{split.num_objects:,}",
        "objects per image, median": lambda split: f"{split.objects_per_image['p50']:,}",
        "p99": lambda split: f"{split.objects_per_image['p99']:,}",
        "max": lambda split: f"{split.objects_per_image['max']:,}",
        "crowd boxes": lambda split: f"{split.num_crowd_boxes:,}",
        "ignore regions": lambda split: f"{split.num_ignore_regions:,}",
        "images with ignored area": lambda split: _part(split.num_images_with_ignored, split.num_images),
        "ignored share of all pixels": lambda split: f"{split.ignored_area_share:.2%}",
        "boxes clipped to their image": lambda split: f"{split.num_boxes_clipped:,}",
        "boxes left out": lambda split: f"{split.num_boxes_excluded:,}",
        "near duplicates left out": lambda split: f"{split.num_images_excluded:,}",
        "image sizes": lambda split: _sizes_named(split.image_sizes),
    }
    body = ((name, *(value(split) for split in splits.values())) for name, value in rows.items())
    return table(("", *map(escape, splits)), body)


def _tiling(splits: Mapping[str, SplitStatistics]) -> str:
    lines = [
        f"<p>{escape(name)} is cut into tiles of {t['size_px']} px that overlap by {t['overlap_px']} px: "
        f"{t['num_pictures']:,} pictures became {t['num_tiles']:,} tiles. Of {t['num_objects']:,} objects "
        f"{t['num_whole']:,} are whole in some tile, {t['num_cut']:,} are labelled by a part of at least "
        f"{t['min_visible_share']:.0%}, {t['num_unlabelled']:,} are ignore regions only.</p>"
        for name, split in splits.items()
        if (t := split.tiling) is not None
    ]
    return "".join(lines)


def _change(change: Change | None) -> str:
    if change is None:
        return "<p>No earlier version has been reported.</p>"
    words = {
        "added": "added", "removed": "removed", "relabelled": "with other boxes or ignore regions",
        "replaced": "with other pixels", "moved": "moved to another split",
    }  # fmt: skip
    rows = [
        (words[what], f"{count:,}", _names(change.examples.get(what, []), count))
        for what, count in change.num_images.items()
    ]
    classes = [
        (escape(name), f"{before:,}", f"{now:,}", f"{now - before:+,}" if now != before else "")
        for name, (before, now) in change.objects_per_class.items()
    ]
    return (
        f"<p>Since version <code>{change.previous}</code>:</p>"
        + table(("images", "", ""), rows, "names")
        + table(("objects", "before", "now", "change"), classes)
    )


def _class_table(report: DatasetReport) -> str:
    splits = report.splits.values()
    peaks = [max(*split.objects_per_class.values(), 1) for split in splits]
    rows = []
    for label, name in enumerate(report.classes):
        cells = [
            f"{split.objects_per_class[name]:,} <small>in {split.images_per_class[name]:,} images</small>"
            + bar(split.objects_per_class[name] / peak, class_colour(label))
            for split, peak in zip(splits, peaks, strict=True)
        ]
        rows.append((swatch(name, class_colour(label)), *cells))
    return table(("", *map(escape, report.splits)), rows, "wide")


def _sizes(splits: Mapping[str, SplitStatistics]) -> str:
    total = [sum(counts) for counts in zip(*(split.sides for split in splits.values()), strict=True)]
    parts = [size_histogram(total), size_legend(), '<div class="row">']
    tables = (
        ("AI-TOD", [split.objects_by_aitod_size for split in splits.values()], {"below 2": "&lt; 2 px",
         "very tiny": "2–8", "tiny": "8–16", "small": "16–32", "medium": "32–64", "large": "64 and more"}),
        ("COCO", [split.objects_by_coco_size for split in splits.values()], {"small": "&lt; 32 px", "medium": "32–96",
         "large": "96 and more"}),
    )  # fmt: skip
    for title, counts, spans in tables:
        rows = [
            (f"{name} <small>{span}</small>", *(_part(split[name], sum(split.values())) for split in counts))
            for name, span in spans.items()
        ]
        parts.append(table((title, *map(escape, splits)), rows))
    return "".join([*parts, "</div>"])


def _heat_maps(splits: Mapping[str, SplitStatistics]) -> str:
    maps = (
        f"<figure>{heat_map(split.centres)}<figcaption>{escape(name)}: darkest is "
        f"{max(map(max, split.centres)):,} of {split.num_objects:,}</figcaption></figure>"
        for name, split in splits.items()
    )
    return f'<div class="row">{"".join(maps)}</div>'


def _pictures(split: str, records: Sequence[ImageRecord], images: Path, classes: Sequence[str]) -> str:
    found = chosen(records, classes)
    figures = "".join(drawn(picture, images, classes) for picture in found)
    return f'<h3>{escape(split)}: {len(found)} of {len(records):,}</h3><div class="pictures">{figures}</div>'


def _legend(classes: Sequence[str]) -> str:
    entries = [swatch(name, class_colour(label)) for label, name in enumerate(classes)]
    return f'<p class="legend">{" ".join(entries)} <span class="swatch"><i class="dashed"></i>ignored</span></p>'


def _part(count: int, total: int) -> str:
    return f"{count:,} <small>{count / total:.1%}</small>" if total else f"{count:,}"


def _sizes_named(sizes: Mapping[str, int]) -> str:
    shown = [f"{size} <small>{count:,}</small>" for size, count in list(sizes.items())[:3]]
    more = len(sizes) - len(shown)
    return "<br>".join([*shown, f"<small>and {more} more</small>"] if more else shown)


def _names(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names):,} more" if count > len(names) else ""
    return escape(", ".join(names)) + more

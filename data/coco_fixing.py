"""Faults of a COCO annotation file that have one remedy, which needs nobody's knowledge of the pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from data.coco import is_int, is_side, is_xywh
from data.coco_layout import CocoFile, above, below, folder_of
from data.label_files import UnreadableFile, read_bytes
from data.records import XYWH, clip_xywh
from data.whole_file import write_whole


def fix_coco(file: CocoFile, images: Path, renamed: Mapping[str, str], *, write: bool) -> Counter[str]:
    """Count by kind what is put right in a file, and with `write` put it right; `renamed`: old -> new picture names.

    Boxes are clipped to their image, those without area in it or that repeat one of the same class are taken out, and
    of annotations with the same id the later ones get new ids. Whatever is malformed stays as it is, and so does a
    file that is not COCO at all: reading it names its faults.
    """
    counts: Counter[str] = Counter()
    try:
        document = json.loads(read_bytes(file.path, None))
    except (UnreadableFile, ValueError, RecursionError):
        return counts
    rows_of = {key: document.get(key) for key in ("images", "annotations")} if isinstance(document, dict) else {}
    if not rows_of or not all(
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in rows_of.values()
    ):
        return counts
    document["annotations"] = _annotations(document, counts)
    named = [image for image in document["images"] if isinstance(image.get("file_name"), str)]
    folder = folder_of(images, file, (image["file_name"] for image in named), renamed)
    for image in named:
        new = renamed.get(below(folder, image["file_name"]))
        if new is not None:
            image["file_name"] = above(folder, new)
    if write and (counts or renamed):
        write_whole(file.path, json.dumps(document))
    return counts


def _annotations(document: dict[str, Any], counts: Counter[str]) -> list[dict[str, Any]]:
    sizes = {
        image["id"]: (image["width"], image["height"])
        for image in document["images"]
        if is_int(image.get("id")) and is_side(image.get("width")) and is_side(image.get("height"))
    }
    taken = {row["id"] for row in document["annotations"] if is_int(row.get("id"))}
    new_ids = (number for number in count(1) if number not in taken)
    ids: set[int] = set()
    boxes: set[tuple[int, int, XYWH]] = set()
    kept = []
    for row in document["annotations"]:
        key, image_id, category = row.get("id"), row.get("image_id"), row.get("category_id")
        if is_int(key) and is_int(image_id) and image_id in sizes and is_int(category) and is_xywh(row.get("bbox")):
            clipped = clip_xywh(row["bbox"], *sizes[image_id])
            if clipped is None:
                counts["boxes without area"] += 1
                continue
            is_region = row.get("ignore") and not row.get("iscrowd")
            if not is_region and (image_id, category, clipped) in boxes:
                counts["repeated boxes"] += 1
                continue
            if not is_region:
                boxes.add((image_id, category, clipped))
            if clipped != tuple(round(side, 2) for side in row["bbox"]):
                counts["clipped boxes"] += 1
                row |= {"bbox": list(clipped), "area": round(clipped[2] * clipped[3], 2)}
            if key in ids:
                counts["repeated annotation ids"] += 1
                row["id"] = next(new_ids)
            ids.add(key)
        kept.append(row)
    return kept

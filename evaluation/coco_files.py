"""A COCO annotation file and a COCO results file, read with suspicion: whoever wrote them, the form is checked."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from reprlib import repr
from typing import Any

from data.coco import is_int, is_side, is_xywh
from data.label_files import UnreadableFile, read_bytes
from evaluation.checks import BadDetections, BadGroundTruth, check_detections, check_ground_truth, repetitions
from evaluation.file_problems import BadFiles, FileTables, Problems
from evaluation.tables import tabulate


def read_coco(ground_truth: Path, detections: Path, problems: Problems) -> FileTables:
    """Read both files; raises BadFiles with what is wrong, by index, the form first and then what it says."""
    document, results = read_json(ground_truth, problems), read_json(detections, problems)
    if document is not None:
        _require_form(ground_truth, document, problems)
    if results is not None and not _are_objects(results):
        rule = "a COCO results file is a list of objects with image_id, category_id, bbox and score"
        problems.add(detections, f"{rule}, found {repr(results)}")
    problems.check()
    # Of images and categories the check of the ground truth finds them.
    for fault in repetitions("annotations", document["annotations"], "id"):
        problems.add(ground_truth, fault)
    problems.check()
    with suppress(BadGroundTruth, BadDetections):
        tables = tabulate(document, results)
        return FileTables(
            tables,
            lambda row: f"{ground_truth}: annotations[{row}]",
            lambda row: f"{detections}: detection {row}",
            _ignore_notes(ground_truth, document["annotations"]),
        )
    # That told of one file alone.
    faults = []
    for path, check in (
        (ground_truth, lambda: check_ground_truth(document)),
        (detections, lambda: check_detections(results, document)),
    ):
        try:
            check()
        except (BadGroundTruth, BadDetections) as error:
            faults.append(f"{path}: {error}")
    raise BadFiles("\n".join(faults))


def _ignore_notes(path: Path, annotations: list[dict[str, Any]]) -> tuple[str, ...]:
    """Tell marks that look as if they did something: pycocotools puts `iscrowd` in their place."""
    marked = [row for row, fields in enumerate(annotations) if fields.get("ignore") and not fields.get("iscrowd")]
    if not marked:
        return ()
    return (
        f"{len(marked)} objects are marked ignore: 1, the first is {path}: annotations[{marked[0]}]: as in pycocotools "
        "they count as any other; iscrowd: 1 is what lets detections on them count neither way",
    )


def read_json(path: Path, problems: Problems) -> Any:
    """Return what a JSON file holds; None, and a problem, where it cannot be read."""
    try:
        content = read_bytes(path, None)
        is_empty = not content.strip()
        value = None if is_empty else json.loads(content)
        if value is None:
            what = f"is empty ({len(content)} bytes)" if is_empty else "holds null alone"
            problems.add(path, f"the file {what}; a file without entries says []")
        return value
    except UnreadableFile as error:
        problems.add(path, str(error))
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}:{error.colno}", f"not JSON: {error.msg}")
    # Bytes that are no text, integers of thousands of digits, lists in lists without end.
    except (ValueError, RecursionError) as error:
        problems.add(path, f"not JSON that can be read: {error}")
    return None


def _require_form(path: Path, document: Any, problems: Problems) -> None:
    """Say what is wrong with a ground truth's form; when nothing is, `tabulate` can take it."""
    keys = ("images", "annotations", "categories")
    if not isinstance(document, dict) or not all(_are_objects(document.get(key)) for key in keys):
        problems.add(path, f"a COCO annotation file is an object with lists of objects in {', '.join(keys)}")
        return
    for key, faults_of in zip(keys, (_image_faults, _annotation_faults, _category_faults), strict=True):
        for index, row in enumerate(document[key]):
            faults = faults_of(row)
            # Annotations may do without.
            if not is_int(row.get("id", 0 if key == "annotations" else None)):
                faults.append(f"'id' must be a whole number, found {repr(row.get('id'))}")
            for fault in faults:
                problems.add(f"{path}: {key}[{index}]", fault)


def _image_faults(image: dict[str, Any]) -> list[str]:
    faults = []
    if not isinstance(image.get("file_name", ""), str):
        faults.append(f"'file_name' must be text, found {repr(image['file_name'])}")
    if {"width", "height"} & image.keys() and not (is_side(image.get("width")) and is_side(image.get("height"))):
        faults.append("'width' and 'height' must be whole numbers of pixels, or both be left out")
    regions = image.get("ignore_regions_xywh", [])
    if not isinstance(regions, list) or not all(is_xywh(region) for region in regions):
        faults.append("'ignore_regions_xywh' must list [x, y, w, h]")
    return faults


def _category_faults(category: dict[str, Any]) -> list[str]:
    name = category.get("name")
    # JSON has halves of characters, and control characters, too.
    if isinstance(name, str) and name and name.isprintable():
        return []
    return [f"'name' must be text that can be printed, found {repr(name)}"]


def _annotation_faults(annotation: dict[str, Any]) -> list[str]:
    faults = []
    area, is_crowd = annotation.get("area", 0), annotation.get("iscrowd", 0)
    # What can be the side of a box can be an area.
    if not is_xywh([area] * 4) or area < 0:
        faults.append(f"'area' must be a number of square pixels, or be left out, found {repr(area)}")
    if not isinstance(is_crowd, int) or is_crowd not in (0, 1):
        faults.append(f"'iscrowd' must be 0 or 1, found {repr(is_crowd)}")
    return faults


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)

"""`compare`: what changed between two versions of a dataset, from DVC's lists of their files and the annotations."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from data.coco_layout import IMAGES, annotation_file
from data.objects import FolderObjects, Objects, file_list
from data.records import SPLITS
from data.remote import cache_folder
from data.report_change import Change, Fingerprint, change_since
from data.restore import find_version


def compare(name: str, before: str, now: str, repo: Path) -> Change:
    """Compare two versions, each named by its beginning or as `current`, from the cache; no picture is read.

    Raises:
        UnknownVersion: see `find_version`.
        MissingObject, CorruptObject: the cache lacks a version's lists or annotations.
    """
    cache = FolderObjects(cache_folder(repo))
    first, second = (find_version(asked, name, repo) for asked in (before, now))
    (then, objects_then), (after, objects_after) = (_read(version, cache) for version in (first, second))
    return change_since(first, then, after, objects_then, objects_after)


def _read(version: str, cache: Objects) -> tuple[dict[str, Fingerprint], Counter[str]]:
    """Fingerprint by file name, and the number of boxes by class over all splits, but of crowd boxes."""
    files = file_list(version, cache)
    prints: dict[str, Fingerprint] = {}
    objects: Counter[str] = Counter()
    for split in SPLITS:
        document = json.loads(cache.read(files[annotation_file(Path(), split).as_posix()]))
        classes = {row["id"]: row["name"] for row in document["categories"]}
        labels: dict[int, list[str]] = defaultdict(list)
        for row in document["annotations"]:
            label = classes[row["category_id"]]
            labels[row["image_id"]].append(json.dumps([label, row["bbox"], row["iscrowd"]]))
            objects[label] += not row["iscrowd"]
        for image in document["images"]:
            # In any order, as in a report: sorting boxes anew changes nothing.
            regions = sorted(map(json.dumps, image["ignore_regions_xywh"]))
            label = json.dumps([sorted(labels[image["id"]]), regions])
            prints[image["file_name"]] = [split, files[f"{IMAGES}/{image['file_name']}"], label]
    return prints, objects

"""The COCO layout: `images/` and `annotations/{train,val,test}.json`, read with suspicion, written to the byte.

Beside COCO's own fields, `images[i]["ignore_regions_xywh"]` lists regions, in pixels, where a detection is neither
right nor wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from data.problems import Problem
from data.records import SPLITS, XYWH, Box, ImageRecord, Split, clip_xywh

IMAGES = "images"
ANNOTATIONS = "annotations"


def annotation_file(folder: Path, split: str) -> Path:
    """Path of a split's annotation file."""
    return folder / ANNOTATIONS / f"{split}.json"


def read_coco(folder: Path, classes: Sequence[str]) -> dict[str, Split]:
    """Read the three annotation files of a folder; a picture in two splits is an error of the later one."""
    splits: dict[str, Split] = {split: read_split(annotation_file(folder, split), classes) for split in SPLITS}
    owner: dict[str, str] = {}
    for split, content in splits.items():
        for image in content.images:
            first = owner.setdefault(image.file_name, split)
            if first != split:
                rule = f"file_name {image.file_name!r} is in split {first!r} too, so a score would not be a fair one"
                content.problems.append(Problem(annotation_file(folder, split), None, rule, "Keep it in one split"))
    return splits


def read_split(path: Path, classes: Sequence[str]) -> Split:
    """Read one annotation file; every fault becomes a `Problem` of the result, nothing is raised.

    Boxes are clipped to their image; those without area inside it are left out. Both are counted.
    """
    return _Reader(path, classes).read()


def read_class_names(path: Path) -> tuple[str, ...]:
    """Category names of an annotation file by ascending id; ValueError when it has no sound `categories`."""
    reader = _Reader(path, ())
    document = reader.document()
    names = reader.category_names(document) if document is not None else {}
    if reader.split.problems:
        raise ValueError("\n".join(str(problem) for problem in reader.split.problems))
    return tuple(names[key] for key in sorted(names))


def write_split(path: Path, split: Split, classes: Sequence[str], info: dict[str, Any]) -> None:
    """Write the split as compact, sorted JSON: the same split gives the same bytes.

    Category ids are 1..C in class order, annotation ids 1..N in image order (pycocotools takes id 0 for `unmatched`).
    """
    annotations: list[dict[str, Any]] = []
    images = sorted(split.images, key=lambda image: image.image_id)
    for image in images:
        for box in image.boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.image_id,
                    "category_id": box.label + 1,
                    "bbox": list(box.box_xywh_px),
                    "area": box.area_px,
                    "iscrowd": int(box.is_crowd),
                }
            )
    document = {
        "info": info | {"num_boxes_clipped": split.num_boxes_clipped, "num_boxes_excluded": split.num_boxes_excluded},
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(classes)],
        "images": [
            {
                "id": image.image_id,
                "file_name": image.file_name,
                "width": image.width_px,
                "height": image.height_px,
                "ignore_regions_xywh": [list(region) for region in image.ignore_xywh_px],
            }
            for image in images
        ],
        "annotations": annotations,
    }
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False), encoding="utf-8")


def is_safe_name(file_name: str) -> bool:
    """Whether a file name stays below the folder it is relative to."""
    path = PurePosixPath(file_name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(file_name) & {"\\", "\0"}


class _Reader:
    """Reads one file and collects its problems."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path = path
        self.labels = {name: label for label, name in enumerate(classes)}
        self.split = Split()

    def read(self) -> Split:
        document = self.document()
        if document is None:
            return self.split
        labels = self._labels_by_category(document)
        images = self._images(document)
        boxes: dict[int, list[Box]] = {image_id: [] for image_id in images}
        ignored: dict[int, list[XYWH]] = {image_id: list(image.ignore_xywh_px) for image_id, image in images.items()}
        seen: set[int] = set()
        for index, row in enumerate(document["annotations"]):
            self._annotation(index, row, images, labels, seen, boxes, ignored)
        self.split.images = [
            image._replace(boxes=tuple(boxes[key]), ignore_xywh_px=tuple(ignored[key]))
            for key, image in sorted(images.items())
        ]
        return self.split

    def document(self) -> dict[str, Any] | None:
        try:
            document = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            self._fault("the file is missing", "Provide annotations/train.json, val.json and test.json")
            return None
        except (ValueError, RecursionError) as error:
            self._fault(f"not JSON: {error}", "Write the file again")
            return None
        if not isinstance(document, dict):
            self._fault("the top level must be an object", "See the COCO format")
            return None
        for key in ("images", "annotations", "categories"):
            rows = document.get(key)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                self._fault(f"{key!r} must be a list of objects", "See the COCO format")
        return None if self.split.problems else document

    def category_names(self, document: dict[str, Any]) -> dict[int, str]:
        names: dict[int, str] = {}
        for index, row in enumerate(document["categories"]):
            key, name = _pick(row, "id", "name")
            if not _is_int(key) or not isinstance(name, str) or not name:
                self._fault(f"categories[{index}] needs an integer 'id' and a 'name'", "Correct it")
            elif key in names or name in names.values():
                self._fault(f"category id {key} or name {name!r} occurs twice", "Keep one")
            else:
                names[key] = name
        return names

    def _labels_by_category(self, document: dict[str, Any]) -> dict[int, int]:
        """Labels of the categories that the card names; using another one is a fault of its annotation."""
        names = self.category_names(document)
        return {key: self.labels[name] for key, name in names.items() if name in self.labels}

    def _images(self, document: dict[str, Any]) -> dict[int, ImageRecord]:
        images: dict[int, ImageRecord] = {}
        names: set[str] = set()
        for index, row in enumerate(document["images"]):
            key, name, width, height = _pick(row, "id", "file_name", "width", "height")
            if not _is_int(key) or not isinstance(name, str):
                self._fault(f"images[{index}] needs an integer 'id' and a 'file_name'", "Correct it")
            elif not is_safe_name(name):
                self._fault(f"image {key}: file_name {name!r} leaves the images folder", "Use a relative path below it")
            elif not (_is_int(width) and _is_int(height) and width > 0 and height > 0):
                self._fault(f"image {key}: 'width' and 'height' must be positive integers", "Correct them")
            elif key in images:
                self._fault(f"image id {key} occurs twice", "Give every image its own id")
            elif name in names:
                self._fault(f"file_name {name!r} occurs twice", "List every file once")
            else:
                names.add(name)
                regions = self._regions(key, row.get("ignore_regions_xywh", []), width, height)
                images[key] = ImageRecord(key, name, width, height, (), regions)
        if not document["images"]:
            self._fault("the split has no images", "Training needs train, selection val and promotion test images")
        return images

    def _regions(self, image_id: int, regions: Any, width_px: int, height_px: int) -> tuple[XYWH, ...]:
        if not isinstance(regions, list) or not all(_is_xywh(region) for region in regions):
            self._fault(f"image {image_id}: 'ignore_regions_xywh' must list [x, y, w, h]", "Correct it")
            return ()
        clipped = (clip_xywh(region, width_px, height_px) for region in regions)
        return tuple(region for region in clipped if region is not None)

    def _annotation(
        self,
        index: int,
        row: dict[str, Any],
        images: dict[int, ImageRecord],
        labels: dict[int, int],
        seen: set[int],
        boxes: dict[int, list[Box]],
        ignored: dict[int, list[XYWH]],
    ) -> None:
        key, image_id, category, bbox, area = _pick(row, "id", "image_id", "category_id", "bbox", "area")
        if not _is_int(key) or not _is_xywh(bbox):
            self._fault(f"annotations[{index}] needs an integer 'id' and a 'bbox' of 4 finite numbers", "Correct it")
            return
        if key in seen:
            self._fault(f"annotation id {key} occurs twice", "Give every annotation its own id")
        seen.add(key)
        image = images.get(image_id) if _is_int(image_id) else None
        if image is None:
            self._fault(f"annotation {key}: no sound image has id {image_id!r}", "Add the image or drop the annotation")
            return
        clipped = clip_xywh(bbox, image.width_px, image.height_px)
        if clipped is None:
            self.split.num_boxes_excluded += 1
            what = f"annotation {key}: box {bbox} has no area inside its {image.width_px}x{image.height_px} px image"
            self._fault(what, "Left out when prepared: mend or delete it", warning=True)
            return
        if row.get("ignore") and not row.get("iscrowd"):
            ignored[image.image_id].append(clipped)
            return
        label = labels.get(category) if _is_int(category) else None
        if label is None:
            known = ", ".join(self.labels)
            self._fault(f"annotation {key}: category {category!r} is not one of the card's classes", f"Known: {known}")
            return
        is_clipped = clipped != tuple(round(side, 2) for side in bbox)
        if is_clipped:
            self.split.num_boxes_clipped += 1
            what = f"annotation {key}: box {bbox} sticks out of its {image.width_px}x{image.height_px} px image"
            self._fault(what, "Clipped when prepared", warning=True)
        if is_clipped or not _is_number(area) or area <= 0:
            area = clipped[2] * clipped[3]
        boxes[image.image_id].append(Box(label, clipped, round(float(area), 2), bool(row.get("iscrowd"))))

    def _fault(self, rule: str, remedy: str, *, warning: bool = False) -> None:
        self.split.problems.append(Problem(self.path, None, rule, remedy, "warning" if warning else "error"))


def _pick(row: dict[str, Any], *names: str) -> list[Any]:
    return [row.get(name) for name in names]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_xywh(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_is_number(side) for side in value)

"""COCO annotation files, read with suspicion from the layouts of `coco_layout`, written to the byte in our own.

Beside COCO's own fields, `images[i]["ignore_regions_xywh"]` lists regions, in pixels, where a detection is neither
right nor wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import repr
from typing import Any

from data.coco_layout import ANNOTATIONS, EXPORTED, IMAGES, CocoFile, CocoLayout, below, find_layout, folder_of
from data.dividing import Divider
from data.label_files import UnreadableFile, is_safe_name, read_bytes
from data.pictures import MAX_SIDE_PX, files_below, is_picture
from data.problems import ImportRefused
from data.records import SPLITS, XYWH, Box, ImageRecord, Split, clip_xywh

# JSON has integers that no float can hold; NaN and infinity are not below it either.
_MAX_NUMBER = 1e12
_LOOKED_FOR = (
    f"{ANNOTATIONS}/ with train.json (val, test) beside {IMAGES}/, or with instances_train2017.json and the like "
    f"beside {IMAGES}/ or train2017/, or train/{EXPORTED}"
)


def recognise(folder: Path) -> tuple[bool, str]:
    """Whether a folder is in a layout of COCO, and what was found or missed."""
    files = find_layout(folder).files
    if not any(file.folders for found in files.values() for file in found):
        return False, f"found no {_LOOKED_FOR}"
    shown = ", ".join(file.path.relative_to(folder).as_posix() for found in files.values() for file in found)
    return True, f"found {shown}"


def read_coco(
    folder: Path, classes: Sequence[str], divide: Divider, find: Callable[[Path], CocoLayout] = find_layout
) -> dict[str, Split]:
    """Read the annotation files that a folder has; a picture in two of them is an error of the later one.

    Every fault becomes a `Problem`, nothing is raised. Boxes are clipped to their image; those without area inside it,
    and repetitions of a box of the same class (the first stays), are left out. Both are counted.
    """
    splits: dict[str, Split] = {split: Split() for split in SPLITS}
    readers: dict[str, _Reader] = {}
    owner: dict[str, str] = {}
    layout = find(folder)
    for split, (file, *others) in layout.files.items():
        content = splits.get(split, splits["train"])
        readers[split] = reader = _Reader(file, layout.images, classes, content)
        reader.read_images()
        for other in others:
            content.report(other.path, f"{file.path.name} is for split {split!r} too", "Keep one of them")
        if not file.folders:
            content.report(file.path, "the folder of its pictures is missing", "Provide it, or remove this file")
        for image in reader.images.values():
            first = owner.setdefault(image.file_name, split)
            if first != split:
                rule = f"file_name {image.file_name!r} is in split {first!r} too, so a score would not be a fair one"
                content.report(file.path, rule, "Keep it in one split")
    if find is find_layout and readers and not any(content.problems for content in splits.values()):
        unlisted = sorted({name for name in files_below(layout.images) if is_picture(name)} - owner.keys())
        if unlisted:
            rule = f"{len(unlisted)} pictures are in no annotation file, for example {unlisted[0]}"
            splits["train"].warn(folder, rule, "Left out when prepared: list them to use them")
    listed = {split: [image.file_name for image in reader.images.values()] for split, reader in readers.items()}
    divided = divide(listed)
    split_of = {name: splits[split] for split, names in divided.items() for name in names}
    for reader in readers.values():
        reader.read_annotations(split_of)
    return splits


def class_names(folder: Path, find: Callable[[Path], CocoLayout] = find_layout) -> tuple[str, ...]:
    """Category names by ascending id; ImportRefused when the files lack sound `categories`, or differ in them."""
    layout = find(folder)
    files = [file for found in layout.files.values() for file in found]
    if not files:
        rule = f"a COCO folder holds {_LOOKED_FOR}"
        raise ImportRefused(f"{str(folder)!r}: {rule}. Add what is missing, or name another format")
    by_file = {file.path.relative_to(folder).as_posix(): _class_names(file, layout.images) for file in files}
    if len({frozenset(names) for names in by_file.values()}) > 1:
        raise ImportRefused(
            f"{str(folder)!r}: the splits must have the same categories, found {by_file}. Correct the files"
        )
    return next(iter(by_file.values()))


def _class_names(file: CocoFile, images: Path) -> tuple[str, ...]:
    reader = _Reader(file, images, (), Split())
    document = reader.document()
    names = reader.category_names(document) if document is not None else {}
    if reader.content.problems:
        raise ImportRefused("\n".join(str(problem) for problem in reader.content.problems))
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
    counts = {"num_boxes_clipped": split.num_boxes_clipped, "num_boxes_excluded": split.num_boxes_excluded}
    if split.num_images_excluded:
        counts["num_images_excluded"] = split.num_images_excluded
    document = {
        "info": info | counts,
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


class _Reader:
    """Reads one file; its problems go into `content`, the split that the file is named for."""

    def __init__(self, file: CocoFile, images: Path, classes: Sequence[str], content: Split) -> None:
        self.path = file.path
        self._file, self._root = file, images
        self.names = tuple(classes)
        self.labels = {name: label for label, name in enumerate(classes)}
        self.content = content
        self.images: dict[int, ImageRecord] = {}
        self._document: dict[str, Any] | None = None

    def read_images(self) -> None:
        """Read the file and take in its images, without boxes."""
        self._document = self.document()
        if self._document is not None:
            self._read_images(self._document)

    def read_annotations(self, split_of: Mapping[str, Split]) -> None:
        """Add every image with its boxes to the split of its file name; an image without a split is left out."""
        if self._document is None:
            return
        labels = self._labels_by_category(self._document)
        boxes: dict[int, dict[tuple[int, XYWH], Box]] = {image_id: {} for image_id in self.images}
        ignored: dict[int, list[XYWH]] = {key: list(image.ignore_xywh_px) for key, image in self.images.items()}
        seen: set[int] = set()
        for index, row in enumerate(self._document["annotations"]):
            self._annotation(index, row, split_of, labels, seen, boxes, ignored)
        for key, image in sorted(self.images.items()):
            if image.file_name in split_of:
                record = image._replace(boxes=tuple(boxes[key].values()), ignore_xywh_px=tuple(ignored[key]))
                split_of[image.file_name].images.append(record)

    def document(self) -> dict[str, Any] | None:
        try:
            document = json.loads(read_bytes(self.path, None))
        except UnreadableFile as error:
            self._fault(str(error), "Provide annotations/train.json, val.json and test.json")
            return None
        except json.JSONDecodeError as error:
            self.content.report(
                self.path, f"not JSON: {error.msg}", "Write it again", line=error.lineno, column=error.colno
            )
            return None
        except (ValueError, RecursionError) as error:
            self._fault(f"not JSON: {error}", "Write the file again")
            return None
        if not isinstance(document, dict):
            self._fault("the top level must be an object", "See the COCO format")
            return None
        rows_of = {key: document.get(key) for key in ("images", "annotations", "categories")}
        for key, rows in rows_of.items():
            if not isinstance(rows, list):
                self._fault(f"{key!r} must be a list of objects", "See the COCO format")
            elif (wrong := next((n for n, row in enumerate(rows) if not isinstance(row, dict)), None)) is not None:
                self._fault(f"{key}[{wrong}] must be an object", "See the COCO format")
        return None if self.content.problems else document

    def category_names(self, document: dict[str, Any]) -> dict[int, str]:
        names: dict[int, str] = {}
        for index, row in enumerate(document["categories"]):
            key, name = _pick(row, "id", "name")
            if not is_int(key) or not isinstance(name, str) or not name:
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

    def _read_images(self, document: dict[str, Any]) -> None:
        images = self.images
        names: set[str] = set()
        texts = (row.get("file_name") for row in document["images"])
        folder = folder_of(self._root, self._file, (text for text in texts if isinstance(text, str)))
        for index, row in enumerate(document["images"]):
            key, name, width, height = _pick(row, "id", "file_name", "width", "height")
            if not is_int(key) or not isinstance(name, str):
                self._fault(f"images[{index}] needs an integer 'id' and a 'file_name'", "Correct it")
            elif not is_safe_name(name):
                self._fault(f"image {key}: file_name {name!r} leaves the images folder", "Use a relative path below it")
            elif not (is_side(width) and is_side(height)):
                rule = f"image {key}: 'width' and 'height' must be positive integers up to {MAX_SIDE_PX}"
                self._fault(rule, "Correct them")
            elif key in images:
                self._fault(f"image id {key} occurs twice", "Give every image its own id")
            elif name in names:
                self._fault(f"file_name {name!r} occurs twice", "List every file once")
            else:
                names.add(name)
                regions = self._regions(key, row.get("ignore_regions_xywh", []), width, height)
                images[key] = ImageRecord(key, below(folder, name), width, height, (), regions)
        if not document["images"]:
            self._fault("the split has no images", "Training needs train, selection val and promotion test images")

    def _regions(self, image_id: int, regions: Any, width_px: int, height_px: int) -> tuple[XYWH, ...]:
        if not isinstance(regions, list) or not all(is_xywh(region) for region in regions):
            self._fault(f"image {image_id}: 'ignore_regions_xywh' must list [x, y, w, h]", "Correct it")
            return ()
        clipped = (clip_xywh(region, width_px, height_px) for region in regions)
        return tuple(region for region in clipped if region is not None)

    def _annotation(
        self,
        index: int,
        row: dict[str, Any],
        split_of: Mapping[str, Split],
        labels: dict[int, int],
        seen: set[int],
        boxes: dict[int, dict[tuple[int, XYWH], Box]],
        ignored: dict[int, list[XYWH]],
    ) -> None:
        key, image_id, category, bbox = _pick(row, "id", "image_id", "category_id", "bbox")
        if not is_int(key) or not is_xywh(bbox):
            self._fault(f"annotations[{index}] needs an integer 'id' and a 'bbox' of 4 finite numbers", "Correct it")
            return
        if key in seen:
            self._fault(f"annotation id {key} occurs twice", "Give every annotation its own id")
        seen.add(key)
        image = self.images.get(image_id) if is_int(image_id) else None
        if image is None:
            self._fault(
                f"annotation {key}: no sound image has id {repr(image_id)}", "Add the image or drop the annotation"
            )
            return
        content = split_of.get(image.file_name)
        if content is None:
            return
        clipped = clip_xywh(bbox, image.width_px, image.height_px)
        if clipped is None:
            content.num_boxes_excluded += 1
            what = f"annotation {key}: box {bbox} has no area inside its {image.width_px}x{image.height_px} px image"
            self._fault(what, "Left out when prepared: mend or delete it", warning=True)
            return
        if row.get("ignore") and not row.get("iscrowd"):
            ignored[image.image_id].append(clipped)
            return
        label = labels.get(category) if is_int(category) else None
        if label is None:
            known = ", ".join(self.labels)
            self._fault(
                f"annotation {key}: category {repr(category)} is not one of the card's classes", f"Known: {known}"
            )
            return
        if (label, clipped) in boxes[image.image_id]:
            content.num_boxes_excluded += 1
            what = f"annotation {key}: box {bbox} of class {self.names[label]!r} occurs twice"
            self._fault(what, "Kept once when prepared: delete the repetition", warning=True)
        else:
            boxes[image.image_id][label, clipped] = self._box(row, image, label, clipped, content)

    def _box(self, row: dict[str, Any], image: ImageRecord, label: int, clipped: XYWH, content: Split) -> Box:
        """Return a sound annotation's box; `clipped` is it within its image."""
        key, bbox, area = _pick(row, "id", "bbox", "area")
        is_clipped = clipped != tuple(round(side, 2) for side in bbox)
        if is_clipped:
            content.num_boxes_clipped += 1
            what = f"annotation {key}: box {bbox} sticks out of its {image.width_px}x{image.height_px} px image"
            self._fault(what, "Clipped when prepared", warning=True)
        if is_clipped or not _is_number(area) or area <= 0:
            area = clipped[2] * clipped[3]
        return Box(label, clipped, round(float(area), 2), bool(row.get("iscrowd")))

    def _fault(self, rule: str, remedy: str, *, warning: bool = False) -> None:
        (self.content.warn if warning else self.content.report)(self.path, rule, remedy)


def _pick(row: dict[str, Any], *names: str) -> list[Any]:
    return [row.get(name) for name in names]


def is_int(value: Any) -> bool:
    """Whether a JSON value is a whole number that an id can be."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_side(value: Any) -> bool:
    """Whether a JSON value can be the width or height of an image."""
    return is_int(value) and 0 < value <= MAX_SIDE_PX


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def is_xywh(value: Any) -> bool:
    """Whether a JSON value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(_is_number(side) for side in value)

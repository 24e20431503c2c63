"""What `evaluation.analysis` says, once more by the definitions: loops over lists, one image and one box at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Box = list[float]


@dataclass(eq=False)
class PlainObject:
    image: int
    label: int
    box: Box
    area: float
    found_at: float = -1.0


@dataclass(eq=False)
class PlainDetection:
    image: int
    label: int
    box: Box
    score: float
    place: int
    outcome: str = "wrong"
    hit: PlainObject | None = None
    meant: PlainObject | None = None

    @property
    def key(self) -> tuple[float, int, int, int]:
        """By descending score; what equal scores are sorted by is ours to choose."""
        return (-self.score, self.image, self.label, self.place)


class PlainAnalysis:
    """Outcomes of all detections; image and class ids count from 1, boxes are whole numbers, one region an image."""

    def __init__(self, truth: dict[str, Any], found: list[dict[str, Any]], max_dets: int) -> None:
        self.num_images, self.num_classes = len(truth["images"]), len(truth["categories"])
        regions = {image["id"]: image.get("ignore_regions_xywh", []) for image in truth["images"]}
        self.annotated = {a["image_id"] - 1 for a in truth["annotations"]}
        self.objects, crowds = [], []
        for a in truth["annotations"]:
            thing = PlainObject(a["image_id"] - 1, a["category_id"] - 1, a["bbox"], a["area"])
            if a["iscrowd"]:
                crowds.append(thing)
            elif not is_covered(a["bbox"], regions[a["image_id"]]):
                self.objects.append(thing)
        self.ignored_scores: list[float] = []
        self.crowd_scores: list[float] = []
        kept = []
        for row, d in enumerate(found):
            if is_covered(d["bbox"], regions[d["image_id"]]):
                self.ignored_scores.append(d["score"])
            else:
                kept.append(PlainDetection(d["image_id"] - 1, d["category_id"] - 1, d["bbox"], d["score"], row))
        self.detections: list[PlainDetection] = []
        self._match(kept, crowds, max_dets)
        for d in self.detections:
            if d.hit is None:
                self._type(d)

    def _match(self, kept: list[PlainDetection], crowds: list[PlainObject], max_dets: int) -> None:
        cells: dict[tuple[int, int], list[PlainDetection]] = {}
        for d in sorted(kept, key=lambda d: d.key):
            cells.setdefault((d.image, d.label), []).append(d)
        for (image, label), in_cell in cells.items():
            free = [o for o in self.objects if (o.image, o.label) == (image, label)]
            own_crowds = [c.box for c in crowds if (c.image, c.label) == (image, label)]
            for d in in_cell[:max_dets]:
                best = nearest(d, free)
                if best is not None and iou(d.box, best.box) >= 0.5:
                    d.outcome, d.hit, best.found_at = "hit", best, d.score
                    free.remove(best)
                elif is_covered(d.box, own_crowds):
                    self.crowd_scores.append(d.score)
                    continue
                self.detections.append(d)
        self.detections.sort(key=lambda d: d.key)

    def _type(self, d: PlainDetection) -> None:
        here = [o for o in self.objects if o.image == d.image]
        own = nearest(d, [o for o in here if o.label == d.label])
        other = nearest(d, [o for o in here if o.label != d.label])
        own_iou, other_iou = iou(d.box, own.box) if own else 0.0, iou(d.box, other.box) if other else 0.0
        if 0.1 <= own_iou < 0.5:
            d.outcome, d.meant = "localisation", own
        elif other_iou >= 0.5:
            d.outcome, d.meant = "class", other
        elif own_iou >= 0.5:
            d.outcome = "duplicate"
        elif other_iou >= 0.1:
            d.outcome = "both"
        else:
            d.outcome = "background"

    def missed(self, threshold: float = 0.0) -> list[PlainObject]:
        meant = {d.meant for d in self.detections if d.score >= threshold}
        return [o for o in self.objects if o.found_at < threshold and o not in meant]

    def mended_ap50(self, types: Collection[str]) -> float | None:
        rows, taken = [], set()
        for d in self.detections:
            label, is_hit = d.label, d.hit is not None
            if d.outcome in types:
                if d.meant is None or d.meant.found_at >= 0 or d.meant in taken:
                    continue
                taken.add(d.meant)
                label, is_hit = d.meant.label, True
            if is_hit or "false positives" not in types:
                rows.append((label, is_hit))
        objects = self.objects
        if "missed" in types:
            objects = [o for o in objects if o not in self.missed()]
        if "false negatives" in types:
            objects = [o for o in objects if o.found_at >= 0]
        precisions = []
        for label in sorted({o.label for o in self.objects}):
            hits = [is_hit for row_label, is_hit in rows if row_label == label]
            num_objects = sum(o.label == label for o in objects)
            if num_objects == 0:
                precisions.append(float(not hits))
                continue
            points = [(sum(hits[:n]) / num_objects, sum(hits[:n]) / n) for n in range(1, len(hits) + 1)]
            levels = np.linspace(0, 1, 101)
            best = [
                max((precision for recall, precision in points if recall >= level), default=0.0) for level in levels
            ]
            precisions.append(sum(best) / len(levels))
        return sum(precisions) / len(precisions) if precisions else None

    def threshold(self, label: int | None) -> tuple[float, float, float, float] | None:
        """Score, precision, recall, F1 of the highest F1."""
        rows = [d for d in self.detections if label in (None, d.label)]
        num_objects = sum(label in (None, o.label) for o in self.objects)
        best = None
        for score in sorted({d.score for d in rows}, reverse=True):
            hits = sum(d.hit is not None for d in rows if d.score >= score)
            reported = sum(d.score >= score for d in rows)
            f1 = Fraction(2 * hits, reported + num_objects)
            if hits and (best is None or f1 > best[0]):
                best = (f1, (score, hits / reported, hits / num_objects, float(f1)))
        return best and best[1]

    def confusion(self, threshold: float) -> list[list[int]]:
        counts = [[0] * (self.num_classes + 1) for _ in range(self.num_classes + 1)]
        free = [o for o in self.objects if o.found_at < threshold]
        for d in self.detections:
            if d.score < threshold:
                continue
            if d.hit:
                counts[d.label][d.label] += 1
                continue
            best = nearest(d, [o for o in free if o.image == d.image])
            if best is not None and iou(d.box, best.box) >= 0.5:
                free.remove(best)
                counts[best.label][d.label] += 1
            else:
                counts[self.num_classes][d.label] += 1
        for o in free:
            counts[o.label][self.num_classes] += 1
        return counts


def nearest(d: PlainDetection, objects: list[PlainObject]) -> PlainObject | None:
    """Of highest IoU, the later of equals."""
    return max(reversed(objects), key=lambda o: iou(d.box, o.box), default=None)


def is_covered(box: Box, by: list[Box]) -> bool:
    """Whether one of these boxes covers at least half of it."""
    return any(intersection(box, other) >= box_area(box) / 2 for other in by)


def box_area(box: Box) -> float:
    return box[2] * box[3]


def intersection(a: Box, b: Box) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def iou(a: Box, b: Box) -> float:
    both = intersection(a, b)
    return both / (box_area(a) + box_area(b) - both)

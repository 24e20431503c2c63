"""Ground truth and detections that anybody made, as `Tables`: COCO JSON, or text files of VisDrone or UAVDT."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.coco import is_side
from evaluation.checks import some
from evaluation.coco_files import read_coco, read_json
from evaluation.file_problems import FileTables, Problems
from evaluation.tables import Tables
from evaluation.text_files import (
    read_uavdt,
    read_visdrone,
    regions_alone,
    sequences_without_regions,
    uavdt_ground_truth,
    visdrone_annotations,
)
from evaluation.uavdt import NO_CLASS
from evaluation.visdrone import NOT_SCORED

_LOOKED_FOR = (
    "a COCO JSON file; a folder of VisDrone's annotations/*.txt, or that one; a folder of UAVDT's *_gt_whole.txt, or "
    "one with these in GT/"
)
# Boxes stick out of their image by less, and read the wrong way most by more.
_BEYOND = 1.1
# Of all boxes: a share that is told, and one above which the file is refused.
_TOLD, _REFUSED = 0.1, 0.5
# In a file that is in another order throughout, a share of all boxes that make sense in it.
_NEARLY_ALL = 0.95


class ScoreFiles(NamedTuple):
    """What was read, how many rows of it were left out, by reason, and what else one must know to trust a score."""

    tables: Tables
    counts: dict[str, int]
    notes: tuple[str, ...]


def read_files(ground_truth: Path, detections: Path, image_sizes: Path | None, *, with_others: bool) -> ScoreFiles:
    """Read both in the format that the ground truth has.

    `image_sizes`: JSON, `{name: [width, height]}`, for images whose size the files do not say; the name is that of the
    picture without folder and suffix, in UAVDT that of the sequence. Category 11 of VisDrone, `others`, stays in
    `with_others`; else its rows are left out and counted.

    Raises:
        BadFiles: all that is wrong, with file and line or index: no known format; rows that are not numbers or too
            short; unknown image, sequence or class; boxes without size, or most in another order than x, y, w, h;
            scores outside 0..1; a file that is missing, or one too many; ids that repeat.
    """
    problems = Problems()
    sizes_px = _sizes(image_sizes, problems) if image_sizes else {}
    is_coco, is_folder = ground_truth.is_file(), ground_truth.is_dir()
    whole = uavdt_ground_truth(ground_truth) if is_folder else None
    annotations = visdrone_annotations(ground_truth) if is_folder and whole is None else None
    if not is_coco and annotations is None and whole is None:
        what = "holds no ground truth" if is_folder else "is neither a file nor a folder"
        problems.add(ground_truth, f"{what}; known are {_LOOKED_FOR}")
    elif not (detections.is_file() if is_coco else detections.is_dir()):
        what = "file" if is_coco else "folder"
        rule = f"there is no such {what}; the ground truth is a {what}, so the detections are one of the same format"
        problems.add(detections, rule)
    problems.check()
    if annotations is not None:
        read = read_visdrone(annotations, detections, problems)
    elif whole is not None:
        read = read_uavdt(whole, detections, problems)
    else:
        read = read_coco(ground_truth, detections, problems)
    tables = _with_sizes(read.tables, sizes_px, is_by_folder=whole is not None)
    read = read._replace(tables=tables)
    notes = [*read.notes, *_order_notes(read, ground_truth, detections, problems)]
    problems.check()
    notes += _notes(read, are_frames=whole is not None)
    if whole is not None and (alone := regions_alone(whole)):
        notes.append(
            f"{len(alone)} files of ignore regions are not used, their sequences have no *_gt_whole.txt: {some(alone)}"
        )
    if whole is not None and (bare := sequences_without_regions(whole)):
        notes.append(f"{len(bare)} sequences have no *_gt_ignore.txt, so no region of theirs is ignored: {some(bare)}")
    if is_coco or with_others:
        return ScoreFiles(tables, {}, tuple(notes))
    tables, counts = _without_others(tables)
    return ScoreFiles(tables, counts, tuple(notes))


def _sizes(path: Path, problems: Problems) -> dict[str, list[int]]:
    sizes_px = read_json(path, problems)
    if sizes_px is not None and not isinstance(sizes_px, dict):
        problems.add(path, "image sizes are an object of names with [width, height]")
    if not isinstance(sizes_px, dict):
        return {}
    for name, size in sizes_px.items():
        if not isinstance(size, list) or len(size) != 2 or not all(is_side(side) for side in size):
            problems.add(path, f"{name!r}: a size is [width, height] in whole pixels")
    return sizes_px


def _with_sizes(tables: Tables, sizes_px: dict[str, list[int]], *, is_by_folder: bool) -> Tables:
    known = tables.image_sizes_px.copy()
    for image, name in enumerate(map(PurePosixPath, tables.file_names)):
        key = name.parent.name if is_by_folder else name.stem
        if not known[image].all() and key in sizes_px:
            known[image] = sizes_px[key]
    return tables._replace(image_sizes_px=known)


def _order_notes(read: FileTables, ground_truth: Path, detections: Path, problems: Problems) -> list[str]:
    """Tell boxes whose numbers stand in another order: they reach beyond their image, and lie in it when read that way.

    Most of a file's boxes are a problem, and so is a good part where nearly all could be read that way; else a good
    part, which may be false ones, is worth a note. Where an image's size is not known, it is as large as the ground
    truth of all images reaches.
    """
    tables = read.tables
    truths = tables.truths.boxes_xywh_px
    reach = (truths[:, :2] + truths[:, 2:]).max(axis=0, initial=0)
    sizes_px = np.where(tables.image_sizes_px > 0, tables.image_sizes_px, reach)
    is_size_known: NDArray[np.bool_] = np.all(tables.image_sizes_px > 0, axis=1)
    notes = []
    for path, table, place in (
        (ground_truth, tables.truths, read.truth_place),
        (detections, tables.detections, read.detection_place),
    ):
        boxes_px, of_image = table.boxes_xywh_px, sizes_px[table.image]
        is_beyond = (boxes_px[:, :2] + boxes_px[:, 2:] > _BEYOND * of_image).any(axis=1)
        fits_as = _fits_as(boxes_px, of_image, is_size_known[table.image])
        order = max(fits_as, key=lambda order: (is_beyond & fits_as[order]).sum())
        fits, is_other = fits_as[order], np.logical_and(is_beyond, fits_as[order])
        if not is_other.any() or is_other.mean() < _TOLD:
            continue
        rule = (
            f"{is_other.mean():.0%} of the boxes reach beyond their image as x, y, w, h and fit as {order}, the first "
            f"is {place(int(is_other.argmax()))}"
        )
        if is_other.mean() > _REFUSED or fits.mean() >= _NEARLY_ALL:
            problems.add(path, f"{rule}; write x, y, width, height")
        else:
            notes.append(f"{rule}: see that all are x, y, w, h")
    return notes


def _fits_as(
    boxes_px: NDArray[np.float64], sizes_px: NDArray[np.float64], is_size_known: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    """By another order of the four numbers, which boxes (N,) make sense in it; rows first only of a known size."""
    first, second, limit = boxes_px[:, :2], boxes_px[:, 2:], _BEYOND * sizes_px
    are_corners: NDArray[np.bool_] = np.all((second > first) & (second <= limit), axis=1)
    is_turned = (first + second <= limit[:, ::-1]).all(axis=1)
    return {"x1, y1, x2, y2": are_corners, "y, x, h, w": np.logical_and(is_turned, is_size_known)}


def _notes(read: FileTables, *, are_frames: bool) -> list[str]:
    tables, notes = read.tables, []
    if not len(tables.truths.label):
        notes.append("the ground truth has no object: there is nothing to find")
    if not len(tables.detections.label):
        notes.append("there is no detection: nothing is found")
    without_size = np.flatnonzero((tables.truths.boxes_xywh_px[:, 2:] <= 0).any(axis=1))
    if len(without_size):
        name = tables.file_names[tables.truths.image[without_size[0]]]
        notes.append(
            f"{len(without_size)} objects have no width or no height, the first in {name}: "
            "as in the official toolkits they stay, and nothing can find them"
        )
    if (tables.detections.label == NO_CLASS).any():
        notes.append("the detections have no class (column 9 is -1): class-aware numbers are left out")
    has_truth = np.isin(np.arange(len(tables.image_ids)), tables.truths.image)
    has_truth |= np.array([len(regions) > 0 for regions in tables.ignore_regions_xywh_px], bool)
    alone = np.flatnonzero(~has_truth[tables.detections.image])
    if are_frames and len(alone):
        notes.append(
            f"{len(alone)} detections are in frames that have no row of ground truth, the first is "
            f"{read.detection_place(int(alone[0]))}, and count as false positives: see that both number the frames "
            "alike"
        )
    return notes


def _without_others(tables: Tables) -> tuple[Tables, dict[str, int]]:
    if NOT_SCORED not in tables.class_names:
        return tables, {}
    others = tables.class_names.index(NOT_SCORED)
    truths = tables.truths.take(tables.truths.label != others)
    found = tables.detections.take(tables.detections.label != others)
    counts = {
        "num_others_ground_truths": len(tables.truths.label) - len(truths.label),
        "num_others_detections": len(tables.detections.label) - len(found.label),
    }
    return (
        tables._replace(
            truths=truths,
            detections=found,
            class_ids=tables.class_ids[:others],
            class_names=tables.class_names[:others],
        ),
        counts,
    )

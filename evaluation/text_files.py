"""Ground truth and detections as VisDrone's and UAVDT's toolkits read them: the rows as they are, nothing clipped.

VisDrone: `annotations/<stem>.txt` and a file of the same name for the detections of each picture. UAVDT:
`<sequence>_gt_whole.txt`, `<sequence>_gt_ignore.txt` where there is one, and `<sequence>.txt` with detections.

Legend: I images, N rows, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import uavdt, visdrone
from data.label_files import UnreadableFile
from data.pictures import is_hidden, is_picture, sizes
from evaluation.file_problems import FileTables, NumberTable, Problems, place_of, read_numbers
from evaluation.tables import DetectionTable, Tables, TruthTable
from evaluation.uavdt import NO_CLASS
from evaluation.visdrone import NOT_SCORED

_VISDRONE_TRUTH = ("x", "y", "w", "h", "score", "category", "truncation", "occlusion")
_VISDRONE_DETECTION = ("x", "y", "w", "h", "score", "category", "-1", "-1")
_UAVDT_TRUTH = ("frame", "id", "x", "y", "w", "h", "out-of-view", "occlusion", "category")
_UAVDT_IGNORE = ("frame", "id", "x", "y", "w", "h", "1", "-1", "-1")
_UAVDT_DETECTION = ("frame", "-1", "x", "y", "w", "h", "score", "1", "class")
_WHOLE, _IGNORE = "_gt_whole.txt", "_gt_ignore.txt"


class _Rows(NamedTuple):
    """Boxes (N, 4) with their image (N,), category (N,) and score (N,)."""

    image: NDArray[np.int64]
    boxes_xywh_px: NDArray[np.float64]
    category: NDArray[np.int64]
    scores: NDArray[np.float64]


def visdrone_annotations(folder: Path) -> Path | None:
    """The folder of VisDrone annotations that `folder` is or has; None where there are none."""
    return next((place for place in (folder / "annotations", folder) if _text_files(place)), None)


def uavdt_ground_truth(folder: Path) -> Path | None:
    """The folder of UAVDT ground truth that `folder` is or has; None where there is none."""
    return next((place for place in (folder / "GT", folder) if _text_files(place, _WHOLE)), None)


def regions_alone(ground_truth: Path) -> list[str]:
    """Names of the files of ignore regions in a folder of UAVDT ground truth that are of none of its sequences."""
    sequences = set(_text_files(ground_truth, _WHOLE))
    return [f"{name}{_IGNORE}" for name in _text_files(ground_truth, _IGNORE) if name not in sequences]


def sequences_without_regions(ground_truth: Path) -> list[str]:
    """Sequences in a folder of UAVDT ground truth that have no file of ignore regions, though others have."""
    with_regions = _text_files(ground_truth, _IGNORE)
    return [name for name in _text_files(ground_truth, _WHOLE) if with_regions and name not in with_regions]


def read_visdrone(annotations: Path, detections: Path, problems: Problems) -> FileTables:
    """Classes are 1 to 10 and, at the end, `others`; sizes are those of pictures in `images/` beside, else 0.

    Raises BadFiles with what is wrong.
    """
    stems = _text_files(annotations)
    with_file = _same_names(stems, annotations, detections, "image", problems)
    truths, found = [], []
    for stem in stems:
        truth = read_numbers(annotations / f"{stem}.txt", _VISDRONE_TRUTH, problems)
        # Category 0 is an ignore region.
        _require_category(truth, 5, range(len(visdrone.CLASSES) + 2), problems)
        truths.append(truth)
        if stem in with_file:
            detected = read_numbers(detections / f"{stem}.txt", _VISDRONE_DETECTION, problems)
            _require_category(detected, 5, range(1, len(visdrone.CLASSES) + 2), problems)
            _require_detections(detected, 0, 4, problems)
            found.append(detected)
    sizes_px = _picture_sizes(annotations.parent / "images", stems, problems)
    problems.check()
    truth_rows, found_rows = (
        _Rows(_numbered(parts), values[:, :4], values[:, 5].astype(np.int64), values[:, 4])
        for parts in (truths, found)
        for values in (np.concatenate([part.values for part in parts]),)
    )
    is_region = truth_rows.category == 0
    regions = _Rows(*(column[is_region] for column in truth_rows))
    objects = _Rows(*(column[~is_region] for column in truth_rows))
    file_names = [f"{stem}.jpg" for stem in stems]
    # The toolkit does not count objects with score 0.
    is_crowd = objects.scores == 0
    classes = (*visdrone.CLASSES, NOT_SCORED)
    return FileTables(
        _tables(file_names, sizes_px, classes, objects, is_crowd, regions, found_rows),
        lambda row: place_of(int(np.flatnonzero(~is_region)[row]), truths),
        lambda row: place_of(row, found),
        _empty_notes(truths, found),
    )


def read_uavdt(ground_truth: Path, detections: Path, problems: Problems) -> FileTables:
    """Images are the frames with at least one row; sizes are 0. Detections of class -1 have the label NO_CLASS.

    Raises BadFiles with what is wrong.
    """
    sequences = _text_files(ground_truth, _WHOLE)
    with_file = _same_names(sequences, ground_truth, detections, "sequence", problems)
    with_regions = _text_files(ground_truth, _IGNORE)
    categories = range(1, len(uavdt.CLASSES) + 1)
    parts: dict[str, list[NumberTable]] = {"truths": [], "regions": [], "found": []}
    file_names: list[str] = []
    for sequence in sequences:
        truth = read_numbers(ground_truth / f"{sequence}{_WHOLE}", _UAVDT_TRUTH, problems)
        _require_category(truth, 8, categories, problems)
        _require_own_ids(truth, problems)
        of_sequence = {"truths": truth}
        if sequence in with_regions:
            of_sequence["regions"] = read_numbers(ground_truth / f"{sequence}{_IGNORE}", _UAVDT_IGNORE, problems)
        if sequence in with_file:
            detected = read_numbers(detections / f"{sequence}.txt", _UAVDT_DETECTION, problems)
            of_sequence["found"] = detected
            _require_category(detected, 8, (-1, *categories), problems)
            _require_detections(detected, 2, 6, problems)
        for table in of_sequence.values():
            frame = table.values[:, 0]
            is_frame = np.logical_and(frame >= 1, frame == np.round(frame))
            table.require(is_frame, lambda row: f"frame {row[0]:g} must be a whole number from 1", problems)
        frames = np.unique(np.concatenate([table.values[:, 0] for table in of_sequence.values()]))
        for what, table in of_sequence.items():
            # From here on the first column is the image.
            table.values[:, 0] = len(file_names) + np.searchsorted(frames, table.values[:, 0])
            parts[what].append(table)
        file_names += [f"{sequence}/img{int(frame):06d}.jpg" for frame in frames]
    has_class = np.concatenate([table.values[:, 8] for table in parts["found"]] or [np.empty(0)]) != -1
    if has_class.any() and not has_class.all():
        rule = f"{int((~has_class).sum())} of {len(has_class)} detections have class -1 in column 9"
        problems.add(detections, f"{rule}; give all of them a class, or none")
    problems.check()
    objects, regions, found = (
        _Rows(values[:, 0].astype(np.int64), values[:, 2:6], values[:, 8].astype(np.int64), values[:, 6])
        for tables in parts.values()
        for values in (np.concatenate([table.values for table in tables] or [np.empty((0, 9))]),)
    )
    sizes_px = np.zeros((len(file_names), 2), np.int64)
    tables = _tables(file_names, sizes_px, uavdt.CLASSES, objects, np.zeros(len(objects.image), bool), regions, found)
    if len(has_class) and not has_class.any():
        no_label = np.full_like(tables.detections.label, NO_CLASS)
        tables = tables._replace(detections=tables.detections._replace(label=no_label))
    return FileTables(
        tables,
        lambda row: place_of(row, parts["truths"]),
        lambda row: place_of(row, parts["found"]),
        _empty_notes(parts["truths"], parts["found"]),
    )


def _text_files(folder: Path, suffix: str = ".txt") -> list[str]:
    """Names of the files in a folder, sorted, without the suffix that they all have."""
    return sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}") if not is_hidden(path.name))


def _same_names(names: Sequence[str], truth: Path, detections: Path, what: str, problems: Problems) -> set[str]:
    """Those that have a file of detections; each must have one, and each file must be of one of them."""
    found = _text_files(detections)
    for name in sorted(set(names) - set(found)):
        rule = f"the file is missing, and {what} {name!r} is in the ground truth"
        problems.add(detections / f"{name}.txt", f"{rule}; an empty file says that nothing was detected")
    for name in sorted(set(found) - set(names)):
        rule = f"there is no {what} {name!r} in {truth}"
        problems.add(detections / f"{name}.txt", f"{rule}; add its ground truth, or remove the file")
    return set(names) & set(found)


def _require_category(table: NumberTable, column: int, known: Sequence[int], problems: Problems) -> None:
    is_known = np.isin(table.values[:, column], known)
    names = f"one of {', '.join(map(str, known))}"
    table.require(is_known, lambda row: f"category {row[column]:g} must be {names}", problems)


def _require_detections(table: NumberTable, box: int, score: int, problems: Problems) -> None:
    has_size = np.logical_and(table.values[:, box + 2] > 0, table.values[:, box + 3] > 0)
    table.require(has_size, lambda row: f"box {row[box : box + 4]} (x, y, w, h) must have w > 0 and h > 0", problems)
    is_score = (table.values[:, score] >= 0) & (table.values[:, score] <= 1)
    table.require(
        is_score, lambda row: f"score {row[score]:g} is outside 0..1; divide scores in percent by 100", problems
    )


def _require_own_ids(truth: NumberTable, problems: Problems) -> None:
    """An object has one row in a frame; a negative id stands for none."""
    lines: dict[tuple[float, ...], int] = {}
    for line, row in zip(truth.lines.tolist(), truth.values[:, :2].tolist(), strict=True):
        first = lines.setdefault(tuple(row), line)
        if first != line and row[1] >= 0:
            rule = f"frame {row[0]:.15g} has id {row[1]:.15g} in line {first} already"
            problems.add(f"{truth.path}:{line}", f"{rule}; give every object of a frame its own, or delete the row")


def _empty_notes(truths: Sequence[NumberTable], found: Sequence[NumberTable]) -> tuple[str, ...]:
    """Tell empty files: they say that there is nothing, and so does a file whose writing was cut short."""
    notes = []
    for what, tables in (("ground truth", truths), ("detections", found)):
        empty = [table.path for table in tables if not len(table.lines)]
        if empty:
            rule = f"{len(empty)} of {len(tables)} files of {what} are empty, the first is {empty[0]}"
            notes.append(f"{rule}: an empty file says that there is nothing")
    return tuple(notes)


def _picture_sizes(folder: Path, stems: Sequence[str], problems: Problems) -> NDArray[np.int64]:
    """Width and height of each picture in `folder`, (I, 2), 0 where there is none."""
    sizes_px = np.zeros((len(stems), 2), np.int64)
    names = sorted(path.name for path in folder.iterdir() if is_picture(path.name)) if folder.is_dir() else []
    places: Mapping[str, int] = {stem: place for place, stem in enumerate(stems)}
    names = [name for name in names if Path(name).stem in places]
    for name, size in zip(names, sizes(folder, names), strict=True):
        if isinstance(size, UnreadableFile):
            problems.add(folder / name, str(size))
        else:
            sizes_px[places[Path(name).stem]] = size
    return sizes_px


def _numbered(parts: Sequence[NumberTable]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(parts)), [len(part.lines) for part in parts])


def _tables(
    file_names: Sequence[str],
    sizes_px: NDArray[np.int64],
    classes: Sequence[str],
    objects: _Rows,
    is_crowd: NDArray[np.bool_],
    regions: _Rows,
    found: _Rows,
) -> Tables:
    order = np.argsort(regions.image, kind="stable")
    ends = np.searchsorted(regions.image[order], np.arange(1, len(file_names)))
    # A box without a size has no area either, whatever the product of two negative sides.
    areas_px = np.maximum(objects.boxes_xywh_px[:, 2:], 0).prod(axis=1)
    return Tables(
        TruthTable(objects.image, objects.category - 1, objects.boxes_xywh_px, areas_px, is_crowd),
        DetectionTable(found.image, found.category - 1, found.boxes_xywh_px, found.scores),
        np.arange(1, len(file_names) + 1),
        tuple(file_names),
        sizes_px,
        tuple(np.split(regions.boxes_xywh_px[order], ends)) if file_names else (),
        np.arange(1, len(classes) + 1),
        tuple(classes),
    )

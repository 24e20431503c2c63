"""`write_report`: what a version of a dataset holds, as `data/reports/<name>/<version>/{report.html,report.json}`.

Outside the version's hash, and free of clock and machine: the same version and the same reports before it give the same
bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from data.card import load_card
from data.coco_layout import IMAGES, annotation_file
from data.reading import PREPARED, read_labels, reader_of
from data.records import SPLITS, ImageRecord
from data.report_change import Change, change_since, fingerprints
from data.report_page import page
from data.splits import SplitRule
from data.statistics import SplitStatistics, split_statistics
from data.versioning import current_version, stage_name
from data.whole_file import write_whole

HTML, JSON, FINGERPRINTS, HISTORY = "report.html", "report.json", "images.json", "history.json"
# The version's entry in dvc.lock, with which `data.restore` brings it back.
LOCK = "dvc.lock"


@dataclass(frozen=True)
class DatasetReport:
    """All of it; `change` is None for the first version that was reported."""

    name: str
    version: str
    description: str
    licence: str
    classes: tuple[str, ...]
    splits: dict[str, SplitStatistics]
    change: Change | None
    schema_version: int = 1


def report_folder(name: str, version: str, repo: Path) -> Path:
    """Where the report of a version lies."""
    return repo / "data" / "reports" / name / version


def write_report(name: str, version: str, repo: Path) -> DatasetReport:
    """Report on `data/processed/<name>`, which must be the version of that name, and return what was written.

    The change is counted from the version that was reported before this one was for the first time.

    Raises:
        UnknownDataset, InvalidCard: see `load_card`.
        FileNotFoundError: the prepared files, or a picture of them, are missing.
        UndecodableImage: a picture that is drawn is damaged.
    """
    card = load_card(name, repo / "data" / "catalog")
    prepared, folder = repo / "data" / "processed" / name, report_folder(name, version, repo)
    if not prepared.is_dir():
        raise FileNotFoundError(f"{prepared}: dataset {name!r} is not prepared. Run `dvc repro prepare@{name}`")
    classes = reader_of(PREPARED).class_names(prepared)
    read = read_labels(PREPARED, prepared, classes, SplitRule()).splits
    records: dict[str, list[ImageRecord]] = {split: read[split].images for split in SPLITS}
    splits = {split: split_statistics(records[split], classes, _info(prepared, split)) for split in records}
    known = folder / FINGERPRINTS
    # A version's name is the hash of its files: they need to be read once only.
    now = json.loads(known.read_bytes()) if known.is_file() else fingerprints(prepared / IMAGES, records)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(".lock")):
        before = _previous(version, folder.parent)
        change = None
        if before is not None:
            counts = _objects_per_class(json.loads((folder.with_name(before) / JSON).read_bytes())["splits"].values())
            then = json.loads((folder.with_name(before) / FINGERPRINTS).read_bytes())
            after = _objects_per_class(asdict(split) for split in splits.values())
            change = change_since(before, then, now, counts, after)
        report = DatasetReport(name, version, card.description, card.licence, classes, splits, change)
        write_whole(known, json.dumps(now, separators=(",", ":"), sort_keys=True))
        write_whole(folder / HTML, page(report, prepared / IMAGES, records))
        write_whole(folder / JSON, json.dumps(asdict(report), indent=1, allow_nan=False))
        if (recorded := current_version(name, repo)) is not None and recorded.version == version:
            entry = {"schema": "2.0", "stages": {stage_name(name): recorded.lock_entry}}
            write_whole(folder / LOCK, yaml.safe_dump(entry, sort_keys=False))
    return report


def summary(report: DatasetReport) -> list[str]:
    """The report in a few lines: a line per split, and one for the change."""
    lines = [f"version {report.version}"]
    for name, split in report.splits.items():
        classes = ", ".join(f"{label} {count}" for label, count in split.objects_per_class.items())
        tiny = sum(split.objects_by_aitod_size[size] for size in ("below 2", "very tiny", "tiny"))
        per_image = split.objects_per_image
        lines.append(
            f"{name}: {split.num_images} images, {split.num_objects} objects ({classes}), {tiny} of them below 16 px; "
            f"per image p50 {per_image['p50']}, p99 {per_image['p99']}, max {per_image['max']}"
        )
        if split.num_images_excluded:
            lines.append(f"{name}: {split.num_images_excluded} images left out: near duplicates of another split")
    if report.change is not None:
        counts = ", ".join(f"{count} {what}" for what, count in report.change.num_images.items())
        lines.append(f"images since version {report.change.previous[:12]}: {counts}")
    return lines


def _objects_per_class(splits: Iterable[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for split in splits:
        total.update(split["objects_per_class"])
    return dict(total)


def _info(prepared: Path, split: str) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(annotation_file(prepared, split).read_bytes())["info"]
    return info


def _previous(version: str, reports: Path) -> str | None:
    """The version that was reported before this one first was, of those whose files are still there.

    `history.json` keeps the order, for a version's name does not tell its age.
    """
    path = reports / HISTORY
    history: list[str] = json.loads(path.read_bytes()) if path.is_file() else []
    if not history or history[-1] != version:
        history.append(version)
        write_whole(path, json.dumps(history))
    earlier = history[: history.index(version)]
    kept = [old for old in earlier if all((reports / old / file).is_file() for file in (JSON, FINGERPRINTS))]
    return kept[-1] if kept else None

"""`python -m data.prepare NAME`: raw data -> `data/processed/<name>/{images/, annotations/{train,val,test}.json}`.

DVC's stage `prepare` runs this in the repository's root. The same card and raw data give the same bytes, so the hash
of the output is the dataset's version; nothing of the clock, the machine or the process enters it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from data import coco
from data.card import DatasetCard, InvalidCard, UnknownDataset, load_card
from data.coco_layout import ANNOTATIONS, IMAGES, annotation_file
from data.problems import InvalidDataset, listing
from data.procedural import render_dataset
from data.reading import READERS, read_raw
from data.records import Split
from data.tile_writer import tile_split


def prepare(name: str, repo: Path) -> Path:
    """Prepare the dataset and return its folder, which appears complete or not at all.

    Raises:
        UnknownDataset, InvalidCard: see `load_card`.
        InvalidDataset: the raw data has errors; all of them are listed.
    """
    card = load_card(name, repo / "data" / "catalog")
    raw, destination = repo / "data" / "raw" / name, repo / "data" / "processed" / name
    with replaced(destination) as folder:
        (folder / IMAGES).mkdir(parents=True)
        (folder / ANNOTATIONS).mkdir()
        splits = _WRITERS[card.format](card, raw, folder / IMAGES)
        info: dict[str, dict[str, Any]] = {split: {"dataset": name, "split": split} for split in splits}
        if card.tiling is not None:
            splits["train"], counts = tile_split(folder / IMAGES, splits["train"], card.tiling)
            info["train"]["tiling"] = card.tiling.model_dump() | counts
            print(f"{name}: train is cut into tiles: {counts}", file=sys.stderr)
        for split, content in splits.items():
            coco.write_split(annotation_file(folder, split), content, card.classes, info[split])
    return destination


def _copy(card: DatasetCard, raw: Path, images: Path) -> dict[str, Split]:
    """Copy the pictures byte for byte: a hard link would let DVC write-protect the owner's files."""
    found = read_raw(card.format, raw, card.classes, card.splits)
    if any(problem.severity == "error" for problem in found.problems):
        raise InvalidDataset(found.problems)
    if found.problems:
        print(listing(found.problems), file=sys.stderr)
    for record in (record for content in found.splits.values() for record in content.images):
        target = images / record.file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.images / record.file_name, target)
    return found.splits


Writer = Callable[[DatasetCard, Path, Path], dict[str, Split]]
_WRITERS: dict[str, Writer] = {**dict.fromkeys(READERS, _copy), "procedural": render_dataset}


@contextmanager
def replaced(destination: Path) -> Iterator[Path]:
    """Yield a sibling folder that takes the destination's place on success and vanishes on failure; others wait."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (destination.with_name(f".{destination.name}.{suffix}") for suffix in ("partial", "old"))
    with FileLock(destination.with_name(f".{destination.name}.lock")):
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield partial
            if destination.exists():
                destination.rename(old)
            partial.rename(destination)
        finally:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)


def main() -> None:
    """Prepare the dataset named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.prepare NAME")
    try:
        prepare(sys.argv[1], Path.cwd())
    except (UnknownDataset, InvalidCard, InvalidDataset) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

"""`check`: everything wrong with a dataset's raw and prepared files, all at once."""

from __future__ import annotations

from pathlib import Path

from data.card import load_card
from data.coco import IMAGES, read_coco
from data.images import image_problems
from data.problems import Problem


def check(name: str, repo: Path) -> list[Problem]:
    """Return the problems of `data/raw/<name>`, where it is COCO, and of `data/processed/<name>`, where it exists.

    Found are: unreadable or malformed annotation files, missing or undecodable images, images of another size than
    recorded, boxes without area inside their image or sticking out, unknown categories, duplicate ids and file names,
    pictures in two splits.

    Raises:
        UnknownDataset, InvalidCard: see `load_card`.
    """
    card = load_card(name, repo / "data" / "catalog")
    raw, prepared = repo / "data" / "raw" / name, repo / "data" / "processed" / name
    folders = [raw] if card.format == "coco" and raw.is_dir() else []
    folders += [prepared] if prepared.is_dir() else []
    problems = []
    if not raw.is_dir():
        place = raw.readlink() if raw.is_symlink() else card.source
        problems.append(Problem(raw, None, "the raw data is missing", f"Bring it back to {place}"))
    for folder in folders:
        splits = read_coco(folder, card.classes)
        problems += [problem for content in splits.values() for problem in content.problems]
        problems += image_problems(folder / IMAGES, [image for content in splits.values() for image in content.images])
    return problems

"""`check`: everything wrong with a dataset's raw and prepared files, all at once."""

from __future__ import annotations

from pathlib import Path

from data.card import load_card
from data.duplicates import near_duplicate_problems
from data.problems import Problem
from data.reading import READERS, read_raw
from data.splits import SplitRule


def check(name: str, repo: Path) -> list[Problem]:
    """Return the problems of `data/raw/<name>`, where its format has a reader, and of `data/processed/<name>`.

    Found are: unreadable or malformed label files, missing or undecodable images, images of another size than
    recorded, boxes without area inside their image or sticking out, unknown classes, duplicate ids, names and boxes,
    pictures in two splits by name or by content, near duplicates among them, pictures and labels that no split uses.

    Raises:
        UnknownDataset, InvalidCard: see `load_card`.
    """
    card = load_card(name, repo / "data" / "catalog")
    raw, prepared = repo / "data" / "raw" / name, repo / "data" / "processed" / name
    problems = []
    if not raw.is_dir():
        place = raw.readlink() if raw.is_symlink() else card.source
        problems.append(Problem(raw, None, "the raw data is missing", f"Bring it back to {place}"))
    elif card.format in READERS:
        found = read_raw(card.format, raw, card.classes, card.splits)
        problems += found.problems + near_duplicate_problems(found.images, found.splits)
    if prepared.is_dir():
        problems += read_raw("coco", prepared, card.classes, SplitRule()).problems
    return problems

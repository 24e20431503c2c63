"""`check`: everything wrong with a dataset's raw and prepared files, all at once."""

from __future__ import annotations

from pathlib import Path

from data.card import load_card
from data.duplicates import near_duplicate_problems
from data.problems import Problem
from data.reading import PREPARED, READERS, read_raw
from data.splits import SplitRule


def check(name: str, repo: Path) -> list[Problem]:
    """Return the problems of `data/raw/<name>`, where its format has a reader, and of `data/processed/<name>`.

    Errors, which stop preparation: unreadable or malformed label files, unknown classes, repeated ids and names,
    pictures that are missing, not regular files, links out of the folder, empty, damaged, of no known type, too large
    to decode or of another size than recorded, pictures in two splits by name or by content, and splits that are
    lacking. Warnings: boxes without area inside their image, sticking out or repeated, which preparation mends;
    near duplicates and sequences across splits, pictures and labels that no split uses, and pictures that other tools
    show differently (EXIF orientation, 16 bits, transparency, CMYK, several frames) or whose suffix is wrong. Of the
    prepared files only errors are told: their warnings are those of the raw ones.

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
        found = read_raw(PREPARED, prepared, card.classes, SplitRule())
        problems += [problem for problem in found.problems if problem.severity == "error"]
    return problems

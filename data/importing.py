"""`register`: make a folder of raw data known: a card, a link `data/raw/<name>`, a line in params.yaml."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Literal

import yaml
from filelock import FileLock
from pydantic import ValidationError
from ruamel.yaml import YAML

from data.card import DatasetCard, InvalidCard, faults
from data.coco import IMAGES, annotation_file, read_class_names
from data.records import SPLITS


class DatasetExists(ValueError):
    """A dataset of that name is already registered."""


class ImportRefused(ValueError):
    """A folder that is not raw data in the format that was named."""


def register(
    name: str,
    path: Path,
    format: Literal["coco"],
    *,
    repo: Path,
    licence: str,
    description: str = "",
    protocol: Literal["coco", "voc", "visdrone", "uavdt", "aitod"] = "coco",
    ignore_rule: Literal["none", "covered-half"] = "none",
) -> DatasetCard:
    """Register raw data where it lies and return its card; on failure nothing stays behind.

    The classes are the categories of annotations/train.json by ascending id; val and test must have the same.

    Raises:
        DatasetExists: a card, raw data or line in params.yaml of that name is there.
        ImportRefused: `path` is no folder, lacks images/ or one of annotations/{train,val,test}.json, or such a file
            cannot be read, has no sound `categories`, or has others than the other splits.
        InvalidCard: the name or another value breaks a rule of the card.
    """
    try:
        card = DatasetCard(
            name=name,
            description=description or f"Imported from {path.name}.",
            licence=licence,
            format=format,
            source=f"data/raw/{name}",
            classes=_class_names(path),
            protocol=protocol,
            ignore_rule=ignore_rule,
        )
    except ValidationError as error:
        raise InvalidCard("\n".join(f"dataset {name!r}: {fault}" for fault in faults(error))) from error
    params, locks = repo / "params.yaml", repo / ".dvc" / "tmp"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "speck-params.lock"), ExitStack() as undo:
        updated = _with_dataset(params, name)
        card_file, link = repo / "data" / "catalog" / f"{name}.yaml", repo / "data" / "raw" / name
        for taken in (card_file, link):
            if os.path.lexists(taken):
                raise DatasetExists(f"dataset {name!r}: {taken} exists. Choose another name or remove it first")
        undo.callback(_remover(card_file))
        _write(card_file, yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))
        undo.callback(_remover(link))
        link.symlink_to(path.resolve(), target_is_directory=True)
        _write(params, updated)
        undo.pop_all()
    return card


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_dir():
        raise ImportRefused(f"{str(path)!r}: raw data must be a folder, and there is none. Correct the path")
    missing = [file for file in (annotation_file(path, split) for split in SPLITS) if not file.is_file()]
    if not (path / IMAGES).is_dir():
        missing.append(path / IMAGES)
    if missing:
        names = ", ".join(str(file) for file in missing)
        raise ImportRefused(
            f"{str(path)!r}: a COCO folder holds images/ and annotations/{{train,val,test}}.json. Add what is missing: "
            f"{names}"
        )
    try:
        by_split = {split: read_class_names(annotation_file(path, split)) for split in SPLITS}
    except (OSError, ValueError) as error:
        raise ImportRefused(str(error)) from error
    if len({frozenset(names) for names in by_split.values()}) > 1:
        raise ImportRefused(
            f"{str(path)!r}: the splits must have the same categories, found {by_split}. Correct the files"
        )
    return by_split["train"]


def _with_dataset(params: Path, name: str) -> str:
    """Return params.yaml with the name added to its sorted list, comments and all."""
    editor = YAML()
    editor.indent(mapping=2, sequence=4, offset=2)
    content = editor.load(params.read_text(encoding="utf-8"))
    names = content["datasets"]
    if name in names:
        raise DatasetExists(f"dataset {name!r}: {params} lists it already. Choose another name")
    names.insert(sum(other < name for other in names), name)
    text = StringIO()
    editor.dump(content, text)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    """Write the whole file or none of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _remover(path: Path) -> Callable[[], None]:
    return lambda: path.unlink(missing_ok=True)

"""`register`: make a folder of raw data known: `data/raw/<name>` (a link or a copy), a card, a line in params.yaml."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

import yaml
from filelock import FileLock
from pydantic import ValidationError
from ruamel.yaml import YAML

from data.card import DatasetCard, InvalidCard, faults
from data.coco import IMAGES, annotation_file, read_class_names
from data.problems import listing
from data.records import SPLITS
from data.voc import class_names, read_voc

Format = Literal["coco", "voc"]
FORMATS: tuple[str, ...] = get_args(Format)
# data/raw/.gitignore lets these in.
_RESERVED = "sample-"


class DatasetExists(ValueError):
    """A dataset of that name is already registered."""


class ImportRefused(ValueError):
    """A folder that is not raw data in the format that was named."""


def register(
    name: str,
    path: Path,
    format: Format,
    *,
    repo: Path,
    licence: str,
    copy: bool = False,
    description: str = "",
    protocol: Literal["coco", "voc", "visdrone", "uavdt", "aitod"] = "coco",
    ignore_rule: Literal["none", "covered-half"] = "none",
) -> DatasetCard:
    """Register raw data where it lies, or as a copy of our own, and return its card; a failure leaves nothing behind.

    The classes are, in COCO, the categories of annotations/train.json by ascending id, and val and test must have the
    same; in Pascal VOC, the sorted names of all objects of all splits.

    Raises:
        DatasetExists: a card, raw data or line in params.yaml of that name is there.
        ImportRefused: `path` is no folder or holds this repository's raw data; it is no such COCO or VOC folder, or
            its classes cannot be told for faults in it; or the name is one that git does not keep out.
        InvalidCard: the name or another value breaks a rule of the card.
    """
    _refuse_places(name, path, repo)
    try:
        card = DatasetCard(
            name=name,
            description=description or f"Imported from {path.name}.",
            licence=licence,
            format=format,
            source=f"data/raw/{name}",
            classes=_CLASS_NAMES[format](path),
            protocol=protocol,
            ignore_rule=ignore_rule,
        )
    except ValidationError as error:
        raise InvalidCard("\n".join(f"dataset {name!r}: {fault}" for fault in faults(error))) from error
    params, locks = repo / "params.yaml", repo / ".dvc" / "tmp"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "speck-params.lock"), ExitStack() as undo:
        updated = _with_dataset(params, name)
        card_file, raw = repo / "data" / "catalog" / f"{name}.yaml", repo / "data" / "raw" / name
        for taken in (card_file, raw):
            if os.path.lexists(taken):
                raise DatasetExists(f"dataset {name!r}: {taken} exists. Choose another name or remove it first")
        undo.callback(_remove, raw)
        if copy:
            partial = raw.with_name(f".{name}.partial")
            undo.callback(_remove, partial)
            _remove(partial)
            _copy_contents(path, partial)
            partial.rename(raw)
        else:
            raw.symlink_to(path.resolve(), target_is_directory=True)
        undo.callback(_remove, card_file)
        _write(card_file, yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))
        _write(params, updated)
        undo.pop_all()
    return card


def _refuse_places(name: str, path: Path, repo: Path) -> None:
    if not path.is_dir():
        raise ImportRefused(f"{str(path)!r}: raw data must be a folder, and there is none. Correct the path")
    if (repo / "data" / "raw").resolve().is_relative_to(path.resolve()):
        raise ImportRefused(f"{str(path)!r}: holds data/raw, which would hold itself. Name the dataset's own folder")
    if name.startswith(_RESERVED):
        raise ImportRefused(
            f"dataset {name!r}: names in {_RESERVED}* are the repository's own samples, and git would take in your "
            "data. Choose another name"
        )


def _coco_class_names(path: Path) -> tuple[str, ...]:
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


def _voc_class_names(path: Path) -> tuple[str, ...]:
    names = class_names(path)
    problems = [problem for content in read_voc(path, names).values() for problem in content.problems]
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise ImportRefused(f"{str(path)!r}: not sound Pascal VOC. Correct what is wrong:\n{listing(errors)}")
    if not names:
        raise ImportRefused(f"{str(path)!r}: no annotation file holds an object, so there is no class. Add labels")
    return names


_CLASS_NAMES: dict[Format, Callable[[Path], tuple[str, ...]]] = {"coco": _coco_class_names, "voc": _voc_class_names}


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


def _copy_contents(source: Path, target: Path) -> None:
    """Copy files and what links lead to, but no modes: a copy of a read-only folder could not be removed."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy_contents(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""`register`: make raw data known: `data/raw/<name>` (a link or a copy), a card, a line in params.yaml."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from filelock import FileLock
from pydantic import ValidationError
from ruamel.yaml import YAML

from data.archives import SUFFIXES, is_archive, unpack
from data.card import NAME_PATTERN, DatasetCard, InvalidCard, faults
from data.known_cards import KnownCard, count, differences, find_known
from data.pictures import is_hidden, is_picture, link_problems
from data.problems import ImportRefused, listing
from data.reading import READERS, Labels, read_labels
from data.whole_file import write_whole

Format = Literal["auto", "coco", "voc", "yolo", "visdrone", "uavdt"]
FORMATS: tuple[str, ...] = ("auto", *READERS)
SCHEME = "s3://"
# data/raw/.gitignore lets these in.
_RESERVED = "sample-"
_UNKNOWN = "unknown"
# Formats of benchmarks that have ignore regions and a protocol of the same name.
_OWN_PROTOCOLS = ("visdrone", "uavdt")
_LABEL_SUFFIXES = (".json", ".xml", ".txt", ".yaml", ".yml", ".names")
_DOCUMENTS = ("readme", "license", "licence")


class DatasetExists(ValueError):
    """A dataset of that name is already registered."""


class Imported(NamedTuple):
    """The card of a registered dataset, and what a person should know about it, a line each."""

    card: DatasetCard
    notes: list[str]


def register(
    name: str,
    path: Path | str,
    format: Format = "auto",
    *,
    repo: Path,
    licence: str | None = None,
    copy: bool = False,
    description: str = "",
    protocol: Literal["coco", "voc", "visdrone", "uavdt", "aitod"] | None = None,
    ignore_rule: Literal["none", "covered-half"] | None = None,
) -> Imported:
    """Register raw data where it lies, or as a copy of our own; a failure leaves nothing behind.

    `path` is a folder, a .zip or .tar archive, or `s3://bucket/prefix`, of which a copy is made in any case. `auto` is
    the one format whose layout the folder has. Where something is known of a dataset of this name (data/known), that
    holds, but for a licence that is given, and its expected counts are compared. The splits are the files' own, or,
    where one is lacking, divided by the pictures' content: `splits` of the card. Without `protocol` it is that of
    the format, and without `ignore_rule` that is `covered-half` where there are ignore regions.

    Raises:
        DatasetExists: a card, raw data or line in params.yaml of that name is there.
        ImportRefused: `path` is no folder, sound archive or readable prefix, or holds this repository's raw data; it
            has no layout or several, labels with errors, or other classes than known; or the name is one that git does
            not keep out.
        InvalidCard: the name or another value breaks a rule of the card.
    """
    _refuse_name(name)
    locks = repo / ".dvc" / "tmp"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"speck-import-{name}.lock"):
        _undo_killed(name, repo)
        _refuse_taken(name, repo)
        with _fetched(str(path), repo / "data" / "raw" / f".{name}.partial") as folder:
            _refuse_places(folder, repo)
            format, reason = recognise(folder) if format == "auto" else (format, None)
            known = find_known(name)
            links = link_problems(folder) if not copy else []
            if links:
                raise ImportRefused(f"{str(path)!r}: links that lead out of the folder:\n{listing(links)}")
            labels, classes = _labels(format, folder, known)
            missing = _missing(labels, folder)
            has_regions = any(image.ignore_xywh_px for split in labels.splits.values() for image in split.images)
            facts = {
                "description": description or f"Imported from {Path(path).name}.",
                "licence": _UNKNOWN,
                "protocol": protocol or (format if format in _OWN_PROTOCOLS else "coco"),
                "ignore_rule": ignore_rule or ("covered-half" if has_regions or format in _OWN_PROTOCOLS else "none"),
                "splits": labels.divider.rule,
            }
            facts |= known.model_dump(exclude={"expected"}) if known is not None else {}
            facts |= {"licence": licence} if licence is not None else {}
            try:
                card = DatasetCard.model_validate(
                    facts | {"name": name, "format": format, "source": f"data/raw/{name}", "classes": classes}
                )
            except ValidationError as error:
                raise InvalidCard("\n".join(f"dataset {name!r}: {fault}" for fault in faults(error))) from error
            _place(card, folder, repo, copy=copy, is_ours=folder != Path(path))
    notes = [f"{format}: {reason}"] if reason else []
    return Imported(card, notes + _notes(card, labels, known, missing))


def recognise(folder: Path) -> tuple[Format, str]:
    """Return the format whose layout a folder has, and how it was told; ImportRefused when it has none or several."""
    found = {format: reader.recognise(folder) for format, reader in READERS.items()}
    matches = [format for format, (is_match, _) in found.items() if is_match]
    if len(matches) == 1:
        return matches[0], found[matches[0]][1]  # type: ignore[return-value]
    shown = "\n".join(f"  {format}: {found[format][1]}" for format in matches or found)
    if matches:
        rule = "has the layout of several formats. Say which with --format"
    else:
        rule = (
            "has the layout of no format that is known. Correct the path, or say which with --format to see its faults"
        )
    raise ImportRefused(f"{str(folder)!r}: {rule}:\n{shown}")


def _labels(format: str, folder: Path, known: KnownCard | None) -> tuple[Labels, tuple[str, ...]]:
    """Read the labels of a folder; return them and its classes, or those that are known."""
    names = READERS[format].class_names(folder)
    if known is not None:
        others = sorted(set(names) - set(known.classes))
        if others:
            rule = f"classes {', '.join(others)} are none of those known of this dataset, {', '.join(known.classes)}"
            raise ImportRefused(f"{str(folder)!r}: {rule}. Import it under another name as data of your own")
    classes = known.classes if known is not None else names
    labels = read_labels(format, folder, classes, known.splits if known is not None else None)
    errors = [problem for problem in labels.problems if problem.severity == "error"]
    if errors:
        raise ImportRefused(f"{str(folder)!r}: not sound {format} data. Correct what is wrong:\n{listing(errors)}")
    if not any(content.images for content in labels.splits.values()):
        raise ImportRefused(f"{str(folder)!r}: no picture is in any split:\n{listing(labels.divider.problems)}")
    if not names:
        raise ImportRefused(f"{str(folder)!r}: no annotation file holds an object, so there is no class. Add labels")
    return labels, classes


def _missing(labels: Labels, folder: Path) -> list[Path]:
    """Return the files of pictures that are not there; ImportRefused when none is."""
    paths = [labels.divider.images / image.file_name for split in labels.splits.values() for image in split.images]
    missing = [path for path in paths if not path.exists()]
    if len(missing) == len(paths):
        raise ImportRefused(
            f"{str(folder)!r}: none of {len(paths)} pictures is there, for example {paths[0]}. Add them"
        )
    return missing


def _notes(card: DatasetCard, labels: Labels, known: KnownCard | None, missing: list[Path]) -> list[str]:
    counts = {split: count(content) for split, content in labels.splits.items()}
    notes = [", ".join(f"{split} {found.images} images with {found.boxes} boxes" for split, found in counts.items())]
    rule = labels.divider.rule
    if rule is not None and rule.rule != "given" and labels.divider.num_drawn:
        notes.append(f"splits: by the rule {rule.rule!r} where the files do not say; change it in the card")
    notes += [str(problem) for problem in labels.divider.problems]
    if labels.problems:
        notes.append(f"{len(labels.problems)} warnings about labels; see speck data check {card.name}")
    images = [image for content in labels.splits.values() for image in content.images]
    if missing:
        notes.append(f"warning: {len(missing)} of {len(images)} pictures are missing, for example {missing[0]}")
    used = {box.label for image in images for box in image.boxes}
    unused = [name for label, name in enumerate(card.classes) if label not in used]
    if unused:
        notes.append(f"warning: no object is of class {', '.join(unused)}; delete it from the card if it is none")
    if card.ignore_rule == "covered-half":
        notes.append("ignore regions: a detection that lies half in them is not scored (ignore_rule in the card)")
    if card.licence == _UNKNOWN:
        notes.append("licence: unknown; write it into the card, for it goes with every model")
    if known is not None:
        notes.append(f"{card.name} is known: its card comes from data/known/{card.name}.yaml")
        notes += [f"warning: not as published: {difference}" for difference in differences(known, labels.splits)]
    return notes


@contextmanager
def _fetched(path: str, partial: Path) -> Iterator[Path]:
    """Yield the folder that `path` names, or is unpacked or downloaded into; the latter is gone at the end.

    What is refused of the latter is told as part of `path`.
    """
    if not path.startswith(SCHEME) and not is_archive(Path(path)):
        yield Path(path)
        return
    remove(partial)
    try:
        if path.startswith(SCHEME):
            from data.s3 import download

            download(path, partial)
        else:
            if not Path(path).is_file():
                raise ImportRefused(f"{path!r}: there is no such archive. Correct the path")
            unpack(Path(path), partial)
        yield _without_wrapping(partial)
    except ImportRefused as error:
        raise ImportRefused(str(error).replace(str(partial), path.rstrip("/"))) from error
    finally:
        remove(partial)


def _without_wrapping(folder: Path) -> Path:
    """Return the folder that holds the data: archives often wrap it in one, with a README or a licence beside it.

    These files are moved into the folder, unless it has its own of that name.
    """
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    others = [entry for entry in entries if not entry.is_dir()]
    if len(folders) != 1 or any(_may_be_data(entry.name) for entry in others):
        return folder
    (inner,) = folders
    for entry in others:
        if not os.path.lexists(inner / entry.name):
            entry.rename(inner / entry.name)
    return _without_wrapping(inner)


def _may_be_data(name: str) -> bool:
    """Whether a file may be a picture, labels, a list, or names of classes."""
    is_document = name.lower().startswith(_DOCUMENTS)
    return is_picture(name) or (name.lower().endswith(_LABEL_SUFFIXES) and not is_document)


def _place(card: DatasetCard, folder: Path, repo: Path, *, copy: bool, is_ours: bool) -> None:
    """Put data, card and line in their places, all or none; a folder that `is_ours` is moved."""
    params = repo / "params.yaml"
    card_file, raw = repo / "data" / "catalog" / f"{card.name}.yaml", repo / "data" / "raw" / card.name
    with FileLock(repo / ".dvc" / "tmp" / "speck-params.lock"), ExitStack() as undo:
        _refuse_taken(card.name, repo)
        updated = _with_dataset(params, card.name)
        marker = _marker(card.name, repo)
        undo.callback(remove, marker)
        marker.touch()
        undo.callback(remove, raw)
        if is_ours:
            folder.rename(raw)
        elif copy:
            partial = raw.with_name(f".{card.name}.partial")
            undo.callback(remove, partial)
            remove(partial)
            copy_contents(folder, partial)
            partial.rename(raw)
        else:
            raw.symlink_to(folder.resolve(), target_is_directory=True)
        undo.callback(remove, card_file)
        content = card.model_dump(mode="json", exclude_none=True)
        write_whole(card_file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
        write_whole(params, updated)
        undo.pop_all()
        remove(marker)


def _marker(name: str, repo: Path) -> Path:
    """The file that is there while an import puts things into their places."""
    return repo / "data" / "raw" / f".{name}.importing"


def _undo_killed(name: str, repo: Path) -> None:
    """Remove what an import placed that was killed before the last place, params.yaml."""
    marker = _marker(name, repo)
    if marker.exists():
        if name not in YAML(typ="safe").load((repo / "params.yaml").read_text(encoding="utf-8"))["datasets"]:
            remove(repo / "data" / "raw" / name)
            remove(repo / "data" / "catalog" / f"{name}.yaml")
        remove(marker)


def _refuse_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidCard(f"dataset {name!r}: name: must match {NAME_PATTERN}, got {name!r}")
    if name.startswith(_RESERVED):
        raise ImportRefused(
            f"dataset {name!r}: names in {_RESERVED}* are the repository's own samples, and git would take in your "
            "data. Choose another name"
        )


def _refuse_taken(name: str, repo: Path) -> None:
    places = (repo / "data" / "catalog" / f"{name}.yaml", repo / "data" / "raw" / name)
    if taken := [str(place) for place in places if os.path.lexists(place)]:
        raise DatasetExists(
            f"dataset {name!r}: {' and '.join(taken)} exists. Choose another name, or remove it first, and its line in "
            "params.yaml"
        )
    _with_dataset(repo / "params.yaml", name)


def _refuse_places(folder: Path, repo: Path) -> None:
    if not folder.is_dir():
        what = f"raw data is a folder, an archive ({', '.join(SUFFIXES)}) or {SCHEME}bucket/prefix, and this is none"
        raise ImportRefused(f"{str(folder)!r}: {what}. Correct the path")
    if (repo / "data" / "raw").resolve().is_relative_to(folder.resolve()):
        raise ImportRefused(f"{str(folder)!r}: holds data/raw, which would hold itself. Name the dataset's own folder")


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


def copy_contents(source: Path, target: Path) -> None:
    """Copy files and what links lead to, but no modes: a copy of a read-only folder could not be removed.

    Raises ImportRefused at what is neither a folder nor a file; `target` is then half full.
    """
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            copy_contents(entry, target / entry.name)
        elif not entry.is_file():
            # A device would be copied without end, a pipe waited for.
            raise ImportRefused(f"{entry}: not a regular file, nor a link to one. Remove it")
        else:
            shutil.copyfile(entry, target / entry.name)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

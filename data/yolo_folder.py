"""Where the parts of a YOLO folder lie: class names, pictures by split, label files."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from data.dividing import UNASSIGNED
from data.label_files import MAX_LIST_BYTES, SPLIT_NAMES, UnreadableFile, is_safe_name, read_lines, shared
from data.pictures import files_below, is_picture
from data.problems import Problem
from data.records import Split
from data.yaml_file import UnreadableYaml, read_mapping

_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


class UnreadableFolder(ValueError):
    """A folder in which the class names cannot be found; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class YoloFolder:
    """The content of a folder; all names are relative to it.

    `source` is the file that holds the class names. `listed`: pictures by split, UNASSIGNED those in none that have
    labels; a split that nothing speaks of is not among the keys. `problems`: what is wrong with lists and names.
    """

    def __init__(self, folder: Path, source: Path, names: tuple[str, ...], entries: dict[str, list[str]]) -> None:
        self.folder, self.source, self.names = folder, source, names
        self._content = Split()
        files = files_below(folder)
        self._files = set(files)
        self._owners: dict[str, str] = {}
        self._lists: set[str] = set()
        self.pictures = [name for name in files if is_picture(name)]
        unsafe = [name for name in self.pictures if not is_safe_name(name)]
        if unsafe:
            rule = f"{len(unsafe)} names of pictures cannot be written down, for example {unsafe[0]!r}"
            self._content.report(folder, rule, "Rename them")
        self.listed: dict[str, list[str]] = {}
        for split, places in (entries or self._darknet_lists()).items():
            self.listed[split] = [name for place in places for name in self._at(split, place)]
        if not self.listed:
            self._by_folder()
        rest = [name for name in self.pictures if name not in self._owners and is_safe_name(name)]
        labelled = [name for name in rest if self.label_file(name) is not None] if self.listed else rest
        if labelled:
            self.listed[UNASSIGNED] = labelled
        if len(labelled) < len(rest):
            number = len(rest) - len(labelled)
            rule = f"{number} pictures are in no split and have no label file"
            self._content.warn(folder, rule, "Left out when prepared: list them to use them")
        for label_file, owners in shared(sorted(chain(*self.listed.values())), self.label_file).items():
            rule = f"{', '.join(owners)} share this label file"
            self._content.report(folder / label_file, rule, "Rename all but one of these pictures, or remove them")

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with lists and names."""
        return self._content.problems

    def label_file(self, picture: str) -> str | None:
        """Return the name of a picture's label file, or None where there is none."""
        path = PurePosixPath(picture).with_suffix(".txt")
        parts = list(path.parts)
        places = [path.as_posix()]
        if "images" in parts[:-1]:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
            places.insert(0, posixpath.join(*parts))
        return next((place for place in places if place in self._files and place not in self._lists), None)

    def unused_labels(self, pictures: set[str]) -> list[str]:
        """Return the text files that are no labels of `pictures` and no lists."""
        used = {self.label_file(name) for name in pictures} | self._lists | {self._relative(self.source)}
        return sorted(name for name in self._files - used if name.endswith(".txt"))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _darknet_lists(self) -> dict[str, list[str]]:
        """Lists beside a `.names` file; one that is the label file of a picture is none."""
        below = self.source.parent.relative_to(self.folder)
        pictures = {PurePosixPath(name).with_suffix(".txt").as_posix() for name in self.pictures}
        found: dict[str, list[str]] = {}
        for stem, split in SPLIT_NAMES.items():
            name = (below / f"{stem}.txt").as_posix()
            if name in self._files and name not in pictures:
                found.setdefault(split, []).append(f"{stem}.txt")
        return found

    def _by_folder(self) -> None:
        for name in self.pictures:
            split = next((SPLIT_NAMES[part] for part in PurePosixPath(name).parts[:-1] if part in SPLIT_NAMES), None)
            if split is not None and is_safe_name(name):
                self._owners[name] = split
                self.listed.setdefault(split, []).append(name)

    def _at(self, split: str, place: str) -> Iterator[str]:
        """Yield the pictures of one entry: a folder, a list, or a picture itself."""
        found = next(
            (name for name in _below(place, [self._relative(self.source.parent)]) if self._is_there(name)), None
        )
        if found is None:
            rule = f"{split}: {place!r} is no file or folder below this one"
            self._content.report(self.source, rule, "Give a path relative to the dataset's folder that stays in it")
            return
        if found in self._files and not is_picture(found):
            yield from self._list(found)
            return
        prefix = "" if found == "." else f"{found}/"
        names = [name for name in self.pictures if name == found or name.startswith(prefix)]
        if not names:
            rule = f"{split}: the split has no images in {place!r}"
            self._content.report(self.source, rule, "Add pictures or correct the path")
        for name in names:
            if is_safe_name(name):
                yield from self._take(name, f"{self.source.name} ({split})", self.source, None)

    def _list(self, list_name: str) -> Iterator[str]:
        path = self.folder / list_name
        self._lists.add(list_name)
        bases = dict.fromkeys((posixpath.dirname(list_name), ""))
        is_empty = True
        try:
            for line, text in read_lines(path, MAX_LIST_BYTES):
                is_empty = False
                # Lists are often written on Windows.
                place = text.strip().replace("\\", "/")
                found = next((name for name in _below(place, bases) if name in self._files), None)
                if found is None or not is_picture(found) or not is_safe_name(found):
                    rule = f"{text.strip()!r} is no picture below this folder"
                    remedy = "Add it, or give a path relative to the list that stays in the dataset"
                    self._content.report(path, rule, remedy, line=line)
                else:
                    yield from self._take(found, f"{path.name}:{line}", path, line)
        except UnreadableFile as error:
            self._content.report(path, str(error), "Write the list again")
            return
        if is_empty:
            self._content.report(path, "the split has no images", "Training needs train, val and test images")

    def _take(self, name: str, owner: str, path: Path, line: int | None) -> Iterator[str]:
        if name in self._owners:
            rule = f"{name!r} is in {self._owners[name]} already, so it would count twice or leak"
            self._content.report(path, rule, "Keep it in one split, once", line=line)
        else:
            self._owners[name] = owner
            yield name

    def _is_there(self, name: str) -> bool:
        return name in self._files or ((name == "." or is_safe_name(name)) and _is_dir(self.folder / name))


def _below(place: str, bases: Iterable[str]) -> Iterator[str]:
    """Yield what a relative path may mean, as names relative to the folder; they are yet to be looked for there."""
    # Some exports write `../train/images` for a folder beside the file.
    texts = (place, place[3:]) if place.startswith("../") else (place,)
    for base in bases:
        for text in texts:
            if text and not text.startswith("/"):
                yield posixpath.normpath(posixpath.join(base, text))


def read_folder(folder: Path) -> YoloFolder:
    """Find the class names and the pictures of a folder; UnreadableFolder where there are no sound class names."""
    return YoloFolder(folder, *find_names(folder))


def find_names(folder: Path) -> tuple[Path, tuple[str, ...], dict[str, list[str]]]:
    """Return the file that holds the class names, these, and its entries for train, val and test; see `read_folder`."""
    candidates = [folder / name for name in _YAML_NAMES if (folder / name).is_file()]
    if not candidates:
        candidates = sorted(path for path in folder.glob("*.y*ml") if path.is_file() and _has_names(path))
    if not candidates:
        candidates = sorted([*folder.glob("*.names"), *folder.glob("*/*.names")])
    if len(candidates) != 1:
        found = f", found {', '.join(path.name for path in candidates)}" if candidates else ""
        rule = f"one data.yaml or .names file must hold the class names{found}"
        raise UnreadableFolder(Problem(folder, None, rule, "Add it, or keep one"))
    (source,) = candidates
    if source.suffix == ".names":
        try:
            names = tuple(text.strip() for _, text in read_lines(source))
        except UnreadableFile as error:
            raise UnreadableFolder(Problem(source, None, str(error), "Write one name a line")) from error
        return source, _sound(source, names), {}
    try:
        content = read_mapping(source)
    except UnreadableYaml as error:
        raise UnreadableFolder(
            Problem(source, error.line, str(error), "Write it anew", "error", error.column)
        ) from error
    return source, _sound(source, _names(source, content)), _entries(folder, source, content)


def _has_names(path: Path) -> bool:
    try:
        return "names" in read_mapping(path)
    except UnreadableYaml:
        return False


def _names(source: Path, content: dict[Any, Any]) -> tuple[str, ...]:
    """Return `names`, a list or a mapping from 0, 1, ..."""
    names = content.get("names")
    if isinstance(names, dict) and set(names) == {*range(len(names))}:
        names = [names[key] for key in range(len(names))]
    if not isinstance(names, list) or not all(
        isinstance(name, (str, int)) and not isinstance(name, bool) for name in names
    ):
        rule = "names must be a list of class names, or a mapping from 0, 1, ... to them"
        raise UnreadableFolder(Problem(source, None, rule, "Correct it; put names like yes and no into quotes"))
    if content.get("nc", len(names)) != len(names):
        rule = f"nc does not equal the number of names, {len(names)}"
        raise UnreadableFolder(Problem(source, None, rule, "Correct one of them"))
    return tuple(str(name) for name in names)


def _sound(source: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or not all(names) or len(set(names)) != len(names):
        rule = f"class names must be there, each once, found {len(names)} of which {len(set(names))} differ"
        raise UnreadableFolder(Problem(source, None, rule, "Correct them"))
    return names


def _entries(folder: Path, source: Path, content: dict[Any, Any]) -> dict[str, list[str]]:
    """Return the entries of train, val and test that are not empty; `path` counts where it is a folder below."""
    root = content.get("path")
    entries: dict[str, list[str]] = {}
    for key, split in SPLIT_NAMES.items():
        values = content.get(key)
        values = [values] if isinstance(values, str) else values
        if not values:
            continue
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UnreadableFolder(Problem(source, None, f"{key} must be a path or a list of paths", "Correct it"))
        is_below = isinstance(root, str) and is_safe_name(root) and _is_dir(folder / root)
        prefix = str(root) if is_below else ""
        entries.setdefault(split, []).extend(posixpath.join(prefix, value) for value in values)
    return entries


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False

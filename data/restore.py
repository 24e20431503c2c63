"""`restore`: an earlier version of a dataset back into data/processed and dvc.lock, by its hash.

What makes a version whole again is its entry in dvc.lock. DVC keeps the entry of everything that it ever made in its
run cache, and `speck data push` sends that along; a report, which `train-all` keeps in MLflow, has that of its version.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.images import threads
from data.objects import MARKER, CorruptObject, FolderObjects, MissingObject, md5_of
from data.prepare import replaced
from data.remote import NoRemote, cache_folder, fetch_version
from data.report import LOCK, report_folder
from data.store import fill
from data.versioning import VersioningFailed, changes_since_lock, current_version, one_writer, stage_name
from data.whole_file import write_whole

CURRENT = "current"


class UnknownVersion(VersioningFailed):
    """No version of the dataset has this hash, or several begin with it."""


class UnversionedChanges(VersioningFailed):
    """data/processed holds what no version does, so it must not be replaced."""


@dataclass(frozen=True)
class Restored:
    """`changed_deps`: raw data and code that are not those which made the version; preparing makes another one."""

    version: str
    changed_deps: tuple[str, ...]


def known_versions(name: str, repo: Path) -> dict[str, dict[str, Any]]:
    """Return the entries for dvc.lock of a dataset's versions, by version, oldest first; the current one is last."""
    output = f"data/processed/{name}"
    found: dict[str, dict[str, Any]] = {}
    records = [path for path in (cache_folder(repo) / "runs").glob("*/*/*") if path.is_file()]
    records += report_folder(name, "", repo).glob(f"*/{LOCK}")
    for path in sorted(records, key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        if output.encode() not in content:
            continue
        try:
            entry = yaml.safe_load(content)
            entry = entry["stages"][stage_name(name)] if path.name == LOCK else entry
            (row,) = entry["outs"]
            if row["path"] == output:
                version = row["md5"].removesuffix(".dir")
                found.pop(version, None)
                found[version] = entry
        except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
            continue  # DVC itself deletes a damaged record.
    if (current := current_version(name, repo)) is not None:
        found.pop(current.version, None)
        found[current.version] = current.lock_entry
    return found


def find_version(asked: str, name: str, repo: Path) -> str:
    """Return the version that `asked` begins, or the one of dvc.lock for `current`. Raises UnknownVersion."""
    if asked == CURRENT:
        if (found := current_version(name, repo)) is None:
            raise UnknownVersion(f"dataset {name!r} has no version yet. Prepare it: `dvc repro prepare@{name}`")
        return found.version
    known = known_versions(name, repo)
    matching = [version for version in known if asked and version.startswith(asked)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(version[:12] for version in reversed(known)) or "none"
    raise UnknownVersion(
        f"{asked!r} must begin exactly one version of dataset {name!r}; {'several do' if matching else 'none does'}. "
        f"Known, newest first: {listed}. `dvc fetch --run-cache` brings what others have pushed; of a "
        f"version that a run in MLflow was trained on, put the artifact data/{name}/{LOCK} into "
        f"data/reports/{name}/<version>/"
    )


def restore(name: str, asked: str, repo: Path) -> Restored:
    """Bring a version back into data/processed/<name> and dvc.lock, whole or not at all, from the cache or the remote.

    A kill on the way leaves the files of one version, the old or the new, or, between two renames, none: then
    `restore` or `dvc checkout` makes them again.

    Raises:
        UnknownVersion: see `find_version`.
        UnversionedChanges: data/processed/<name> holds what no version does.
        MissingObject, CorruptObject, SourceUnavailable: neither the cache nor the remote has the files.
        VersioningFailed: DVC failed.
    """
    version = find_version(asked, name, repo)
    entry = known_versions(name, repo)[version]
    with one_writer(repo) as lock:
        # A plain `dvc repro` knows nothing of `one_writer`.
        with replaced(repo / "data" / "processed" / name) as partial:
            _require_versioned(name, repo)
            _fill(partial, version, repo)
        _record(name, entry, repo)
        return Restored(version, _changed_deps(name, repo, lock))


def _fill(folder: Path, version: str, repo: Path) -> None:
    cache = FolderObjects(cache_folder(repo))
    try:
        fill(folder, version, cache)
    except (MissingObject, CorruptObject) as error:
        try:
            fetch_version(version, repo)
        except NoRemote:
            raise error from None
        fill(folder, version, cache)
    (folder / MARKER).unlink()


def _require_versioned(name: str, repo: Path) -> None:
    """Compare by content, not with dvc.lock: after a kill that may name another version than the one that is there."""
    folder = repo / "data" / "processed" / name
    if not folder.exists():
        return
    cache = FolderObjects(cache_folder(repo))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with threads() as pool:
        digests = list(pool.map(md5_of, paths))
    rows = [
        {"md5": digest, "relpath": path.relative_to(folder).as_posix()}
        for path, digest in zip(paths, digests, strict=True)
    ]
    rows.sort(key=lambda row: row["relpath"])
    version = hashlib.md5(json.dumps(rows, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    if not all(cache.exists(digest) for digest in (f"{version}.dir", *digests)):
        raise UnversionedChanges(
            f"data/processed/{name}: holds what no version in DVC's cache does, and would be lost. Keep it with "
            f"`dvc commit -f {stage_name(name)}`, or delete the folder"
        )


def _changed_deps(name: str, repo: Path, lock: int) -> tuple[str, ...]:
    found = (change.get("changed deps", {}) for change in changes_since_lock(name, repo, lock))
    return tuple(sorted(path for paths in found for path in paths))


def _record(name: str, entry: dict[str, Any], repo: Path) -> None:
    """Put a stage's entry into dvc.lock, as DVC writes it."""
    path = repo / "dvc.lock"
    content: dict[str, Any] = {"schema": "2.0"}
    if path.is_file():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content.setdefault("stages", {})[stage_name(name)] = entry
    write_whole(path, yaml.safe_dump(content, sort_keys=False))

"""What datasets leave behind and no version needs: objects in DVC's cache, parts of imports that were killed."""

from __future__ import annotations

import json
import os
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import yaml
from filelock import FileLock, Timeout

from data.card import card_names
from data.importing import remove
from data.objects import FolderObjects
from data.remote import IN_REMOTE, PARTIALS, cache_folder, remote_states
from data.restore import known_versions
from data.versioning import current_version


class UnneededVersion(NamedTuple):
    """A version in DVC's cache: the objects that it alone needs, its list first; `remote`: see `remote_states`."""

    version: str
    paths: list[Path]
    remote: str

    @property
    def is_only_copy(self) -> bool:
        """Whether nobody knows of another: that the remote does not answer does not say that it has one."""
        return self.remote != IN_REMOTE


def current_versions(repo: Path) -> set[str]:
    """The versions that dvc.lock records."""
    found = (current_version(name, repo) for name in card_names(repo / "data" / "catalog"))
    return {version.version for version in found if version is not None}


def unneeded_versions(needed: Set[str], repo: Path) -> list[UnneededVersion]:
    """Return the dataset versions in the cache that are not `needed`, and what the remote has of them.

    Only versions that DVC recorded when it prepared them are looked at: whatever else lies in the cache is somebody
    else's, and what it shares with an unneeded version stays too. What several unneeded versions share belongs to one
    that is an only copy, if any is.
    """
    cache = FolderObjects(cache_folder(repo))
    known = {version for name in card_names(repo / "data" / "catalog") for version in known_versions(name, repo)}
    unneeded = sorted(version for version in known - needed if cache.exists(f"{version}.dir"))
    states = remote_states({version: version for version in unneeded}, repo)[0] if unneeded else {}
    kept = _named_by_dvc_files(repo)
    for path in (cache_folder(repo) / "files" / "md5").glob("*/*.dir"):
        if path.parent.name + path.stem not in unneeded:
            kept |= _members(path)
    found = [UnneededVersion(version, [cache.path(f"{version}.dir")], states[version]) for version in unneeded]
    for one in sorted(found, key=lambda one: not one.is_only_copy):
        members = _members(one.paths[0]) - kept
        kept |= members
        one.paths.extend(path for path in map(cache.path, sorted(members)) if path.is_file())
    return found


def killed_imports(repo: Path) -> list[Path]:
    """Return what imports, fixes and preparations left that were killed; no copy that may be the only one."""
    folders = (repo / "data" / "raw", repo / "data" / "processed")
    found = [
        path for folder in folders for suffix in ("partial", "fixed", "old") for path in folder.glob(f".*.{suffix}")
    ]
    # Killed between two renamings, which the next try takes up.
    found = [path for path in found if path.suffix != ".old" or os.path.lexists(path.with_name(path.stem[1:]))]
    return sorted(found) + sorted(cache_folder(repo).glob(PARTIALS))


def remove_leftover(path: Path, repo: Path) -> bool:
    """Delete one of `killed_imports` if it is one still and nobody is at work on its dataset; return whether it went.

    Under the lock of `one_writer`, by which others fill DVC's cache.
    """
    name = path.stem[1:]
    locks = {
        repo / "data" / "raw": repo / ".dvc" / "tmp" / f"speck-import-{name}.lock",
        repo / "data" / "processed": path.with_name(f".{name}.lock"),
    }
    lock = locks.get(path.parent)
    try:
        with nullcontext() if lock is None else FileLock(lock, timeout=0):
            is_leftover = path in killed_imports(repo)
            if is_leftover:
                remove(path)
            return is_leftover
    except Timeout:
        return False


def _members(path: Path) -> set[str]:
    try:
        return {row["md5"] for row in json.loads(path.read_bytes())}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _named_by_dvc_files(repo: Path) -> set[str]:
    """Hashes of single files that somebody tracks by a .dvc file or another stage."""
    found: set[str] = set()
    for path in (*repo.glob("*.dvc"), *repo.glob("data/**/*.dvc"), repo / "dvc.lock"):
        if path.is_file():
            found |= _hashes(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def _hashes(content: object) -> set[str]:
    if isinstance(content, dict):
        own = {content["md5"]} if isinstance(content.get("md5"), str) else set()
        return own.union(*map(_hashes, content.values()))
    return set().union(*map(_hashes, content)) if isinstance(content, list) else set()

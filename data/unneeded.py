"""What datasets leave behind and no version needs: objects in DVC's cache, parts of imports that were killed."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

import yaml

from data.card import card_names
from data.objects import FolderObjects
from data.remote import PARTIALS, cache_folder
from data.restore import known_versions
from data.versioning import current_version


def current_versions(repo: Path) -> set[str]:
    """The versions that dvc.lock records."""
    found = (current_version(name, repo) for name in card_names(repo / "data" / "catalog"))
    return {version.version for version in found if version is not None}


def unneeded_objects(needed: Set[str], repo: Path) -> dict[str, list[Path]]:
    """Return the cache's objects of dataset versions that are not `needed`, by version, each version's list first.

    Only versions that DVC recorded when it prepared them are looked at: whatever else lies in the cache is somebody
    else's, and what it shares with an unneeded version stays too.
    """
    cache = FolderObjects(cache_folder(repo))
    unneeded = {
        version for name in card_names(repo / "data" / "catalog") for version in known_versions(name, repo)
    } - needed
    kept = _named_by_dvc_files(repo)
    for path in (cache_folder(repo) / "files" / "md5").glob("*/*.dir"):
        if path.parent.name + path.stem not in unneeded:
            kept |= _members(path)
    found: dict[str, list[Path]] = {}
    for version in sorted(unneeded):
        listed = cache.path(f"{version}.dir")
        members = sorted(_members(listed) - kept) if listed.is_file() else []
        paths = [path for path in (listed, *map(cache.path, members)) if path.is_file()]
        # Two unneeded versions may share objects; they go with the first.
        kept |= set(members)
        if paths:
            found[version] = paths
    return found


def killed_imports(repo: Path) -> list[Path]:
    """Return what imports and preparations left that were killed."""
    folders = (repo / "data" / "raw", repo / "data" / "processed")
    return sorted(
        path for folder in folders for suffix in ("partial", "old") for path in folder.glob(f".*.{suffix}")
    ) + sorted(cache_folder(repo).glob(PARTIALS))


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

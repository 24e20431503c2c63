"""How large a node's store is, and room in it: whole dataset versions go, with their decoded pictures."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.image_cache import picture_folder
from data.objects import MARKER

# A version, or what was fetched of one so far.
_ENTRY = re.compile(r"([0-9a-f]{32})|\.([0-9a-f]{32})\.partial")


@dataclass(frozen=True)
class StoredVersion:
    """What a store holds of one version: `folders`, finished or not, and decoded pictures.

    `size_bytes` is what deleting it frees: a hard link into DVC's cache takes no room. `used_s`: when it was last asked
    for, in seconds since 1970.
    """

    version: str
    folders: tuple[Path, ...]
    size_bytes: int
    used_s: float


def stored_versions(root: Path) -> list[StoredVersion]:
    """What lies in a store, the version that was used least recently first."""
    folders: dict[str, set[Path]] = {}
    # A dataset's name never begins with a dot, as `.pictures` does.
    for path in (path for path in root.glob("*/*") if not path.parent.name.startswith(".")):
        if match := _ENTRY.fullmatch(path.name):
            folders.setdefault(match[1] or match[2], set()).add(path)
    for path in picture_folder(root, "").glob("*"):
        folders.setdefault(path.name, set()).add(path)
    found = [
        StoredVersion(
            version=version,
            folders=tuple(sorted(places)),
            size_bytes=freed_bytes(places),
            used_s=_used_s(places),
        )
        for version, places in folders.items()
    ]
    return sorted(found, key=lambda stored: stored.used_s)


def make_room(root: Path, max_bytes: int) -> list[StoredVersion]:
    """Remove versions that no process uses, least recently used first, until the store is no larger than `max_bytes`.

    Returns what was removed; a store may stay larger when all that is left is in use, or another user's.
    """
    removed = []
    # One at a time: who finds a version locked that another is just removing would remove the next one as well.
    with suppress(PermissionError), locked(root / ".room.lock", fcntl.LOCK_EX):
        stored = stored_versions(root)
        total_bytes = sum(one.size_bytes for one in stored)
        for one in stored:
            if total_bytes <= max_bytes:
                break
            # What takes no room of its own would go in vain.
            if one.size_bytes and remove(one):
                removed.append(one)
                total_bytes -= one.size_bytes
    return removed


def remove(stored: StoredVersion) -> bool:
    """Delete a version and return whether it was: not while a process uses it, nor where another user owns it."""
    root = stored.folders[0].parents[1]
    # Found now, for a process may have begun to use the version since it was listed; and made, so that none begins.
    locks = set(root.glob(f"*/.{stored.version}.lock")) | {
        lock_file(folder.with_name(stored.version)) for folder in stored.folders if folder.parent.name != ".pictures"
    }
    with ExitStack() as stack, suppress(BlockingIOError, PermissionError):
        for lock in sorted(locks):
            stack.enter_context(locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
        for folder in stored.folders:
            # First, so that what an interruption leaves is nobody's version.
            (folder / MARKER).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
        return True
    return False


def lock_file(folder: Path) -> Path:
    """Who uses a stored version holds a shared lock on this file; who deletes one, an exclusive lock."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold `flock`'s lock on a file, made if need be. Raises BlockingIOError if it would have to wait under LOCK_NB."""
    # For reading, so that several users can share a store.
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        # A child that was forked meanwhile has the descriptor as well, so that closing it would not do.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def freed_bytes(places: Iterable[Path]) -> int:
    """Disk space that is free once these folders are deleted; files that have another name elsewhere stay."""
    total = 0
    # `walk` goes on where another process removes a folder, or gives it its final name.
    for folder, _, names in (found for place in places for found in os.walk(place)):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(folder, name))
                if status.st_nlink == 1:
                    total += status.st_blocks * 512
    return total


def _used_s(folders: Iterable[Path]) -> float:
    """When a version was last asked for; where it never got that far, when something was made of it."""
    times: dict[str, list[float]] = {"asked for": [], "made": []}
    for folder in folders:
        for what, path in (("asked for", folder / MARKER), ("made", folder)):
            with suppress(FileNotFoundError):
                times[what].append(path.stat().st_mtime)
    return max(times["asked for"] or times["made"], default=0.0)

"""`materialise`: a verified, read-only copy of one dataset version on this node's own disk.

A source is a folder in DVC's layout, the cache `.dvc/cache` or a local remote: `files/md5/ab/cdef...` holds the content
with hash abcdef..., and `files/md5/ab/cdef....dir` lists a directory's files as `[{"md5", "relpath"}, ...]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from filelock import FileLock

MARKER = ".verified"
CHUNK_BYTES = 2**20


class StoreError(RuntimeError):
    """A dataset version could not be materialised; nothing is left behind."""


class CorruptObject(StoreError):
    """An object's bytes do not have the hash it is filed under."""


class MissingObject(StoreError):
    """The source lacks an object of the version."""


class UnsupportedSource(StoreError):
    """The source is of a kind that cannot be read yet."""


def default_root() -> Path:
    """The node's store, absolute: SPECK_STORE, which may begin with `~`, else `speck` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPECK_STORE") or cache / "speck").expanduser().absolute()


def materialise(name: str, version: str, *, source: str, root: Path) -> Path:
    """Return `<root>/<name>/<version>/` with exactly that version's files, each compared with its md5.

    Write-protected objects on the same file system are hard-linked; others are copied, for their owner could change
    them under us. The first process on a node does the work, the others wait for it and return its result.

    Raises:
        UnsupportedSource: the source is a URL other than `file://`.
        MissingObject, CorruptObject: the source is incomplete or damaged.
        ValueError: name or version is not well-formed.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) or not re.fullmatch(r"[0-9a-f]{32}", version):
        raise ValueError(f"dataset {name!r}, version {version!r}: need a lower-case name and 32 hex digits")
    objects = _source_folder(source) / "files" / "md5"
    folder = root / name / version
    if (folder / MARKER).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{version}.lock")):
        if not (folder / MARKER).exists():
            partial = folder.with_name(f".{version}.partial")
            for leftover in (partial, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                _fill(partial, version, objects)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fill(folder: Path, version: str, objects: Path) -> None:
    """Fetch the version's files into the folder; the marker comes last."""
    files = _file_list(version, objects)
    for parent in sorted({(folder / relpath).parent for relpath in files}):
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        num_copied = sum(
            pool.map(lambda item: _fetch(_object(objects, item[1]), folder / item[0], item[1]), files.items())
        )
    if num_copied:
        # A crash of the machine must not leave a marker beside files that never reached the disk.
        os.sync()
    (folder / MARKER).write_text(json.dumps({"version": version, "num_files": len(files)}), encoding="utf-8")


def _file_list(version: str, objects: Path) -> dict[str, str]:
    """Return md5 by relative path of a version's directory object, itself verified."""
    path = _object(objects, version).with_suffix(".dir")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _missing(path) from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != version:
        raise _corrupt(path, version, found)
    files = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
    for relpath, md5 in files.items():
        parts = PurePosixPath(relpath).parts
        if not parts or parts[0] == "/" or ".." in parts or relpath == MARKER or not re.fullmatch(r"[0-9a-f]{32}", md5):
            raise CorruptObject(
                f"{path}: entry {relpath!r} ({md5!r}) leaves the dataset's folder. Do not use this source"
            )
    return files


def _fetch(source: Path, target: Path, md5: str) -> bool:
    """Put the object at the target, verified and read-only; return whether it was copied rather than linked."""
    try:
        with source.open("rb") as original:
            is_linked = os.fstat(original.fileno()).st_mode & 0o222 == 0 and _link(source, target)
            if is_linked:
                found = _hash(original, None)
            else:
                with target.open("wb") as copy:
                    found = _hash(original, copy)
                target.chmod(0o444)
    except FileNotFoundError:
        raise _missing(source) from None
    if found != md5:
        raise _corrupt(source, md5, found)
    return not is_linked


def _link(source: Path, target: Path) -> bool:
    """Try a hard link: it fails across file systems, and where the owner differs and the kernel protects links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def _hash(original: BinaryIO, copy: BinaryIO | None) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := original.read(CHUNK_BYTES):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest()


def _object(objects: Path, md5: str) -> Path:
    return objects / md5[:2] / md5[2:]


def _source_folder(source: str) -> Path:
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Path(source)
    if scheme != "file":
        raise UnsupportedSource(f"source {source!r}: {scheme}:// cannot be read yet. Use a folder, or `dvc pull` first")
    return Path(rest)


def _missing(path: Path) -> MissingObject:
    return MissingObject(
        f"{path}: not in this source. Fetch it with `dvc pull`, or store it again with `dvc commit -f` and `dvc push`"
    )


def _corrupt(path: Path, expected: str, found: str) -> CorruptObject:
    return CorruptObject(
        f"{path}: expected md5 {expected}, found {found}. Delete this object, then `dvc pull`, or prepare the dataset "
        "again with `dvc repro -f`"
    )

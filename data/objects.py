"""Objects in DVC's layout, each filed under the md5 of its content: in a folder, or below a prefix of an S3 bucket.

The folder may be a cache, `.dvc/cache`, or a local remote. `files/md5/ab/cdef...` holds the content with hash
abcdef..., and `files/md5/ab/cdef....dir` lists a directory's files as `[{"md5", "relpath"}, ...]`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

CHUNK_BYTES = 2**20
# Of the same object, for bytes that were damaged on their way.
NUM_ATTEMPTS = 3
# Of a request and its body; within each the client repeats what fails before the body begins.
_NUM_BODY_ATTEMPTS = 5
MARKER = ".verified"
MD5 = re.compile("[0-9a-f]{32}")


class StoreError(RuntimeError):
    """A dataset version could not be had; nothing half-made can be seen."""


class CorruptObject(StoreError):
    """An object's bytes do not have the hash it is filed under."""


class MissingObject(StoreError):
    """The source lacks an object of the version."""


class UnsupportedSource(StoreError):
    """The source is of a kind that cannot be read."""


class SourceUnavailable(StoreError):
    """The source refuses, or did not answer again and again."""


class Objects(Protocol):
    """A place that holds objects. A name is an md5, or an md5 with `.dir`."""

    def address(self, name: str) -> str:
        """Where the object is, for people."""

    def exists(self, name: str) -> bool:
        """Whether it is there. Raises SourceUnavailable."""

    def lacking(self, sizes_bytes: Mapping[str, int]) -> list[str]:
        """Names of the objects that are not there with this size. Raises SourceUnavailable."""

    def put(self, name: str, source: Path) -> None:
        """Take in a file as this object, whole or not at all. Raises SourceUnavailable."""

    def read(self, name: str) -> bytes:
        """Its content, not compared with its name. Raises MissingObject, SourceUnavailable."""

    def fetch(self, name: str, target: Path) -> str:
        """Put it at the target, write-protected, and return its md5. Raises MissingObject, SourceUnavailable."""


def open_objects(source: str, *, attempts: int = 5, **options: str) -> Objects:
    """The objects of a folder, `file://folder` or `s3://bucket/prefix`; `attempts` and `options`: see `s3.connect`.

    Raises UnsupportedSource for another kind of URL, SourceUnavailable when no client can be made.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        return FolderObjects(Path(source))
    if scheme == "file":
        return FolderObjects(Path(rest))
    if scheme == "s3" and rest.strip("/"):
        return S3Objects(source, attempts=attempts, **options)
    raise UnsupportedSource(f"source {source!r}: must be a folder or s3://bucket/prefix. Use one, or `dvc pull` first")


def file_list(version: str, objects: Objects) -> dict[str, str]:
    """Return md5 by relative path of a version's files.

    Raises:
        MissingObject, SourceUnavailable: the version cannot be read.
        CorruptObject: its list has another hash, or a path that leaves the dataset's folder.
    """
    name = f"{version}.dir"
    for _ in range(NUM_ATTEMPTS):
        content = objects.read(name)
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found == version:
            break
    else:
        raise _corrupt(objects.address(name), version, found)
    files = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
    for relpath, md5 in files.items():
        parts = PurePosixPath(relpath).parts
        if not parts or parts[0] == "/" or ".." in parts or relpath == MARKER or not MD5.fullmatch(md5):
            raise CorruptObject(
                f"{objects.address(name)}: entry {relpath!r} ({md5!r}) leaves the dataset's folder. "
                "Do not use this source"
            )
    return files


def fetch_verified(objects: Objects, md5: str, target: Path) -> None:
    """Put an object at the target with the right bytes, or none; wrong ones are fetched again, NUM_ATTEMPTS in all.

    Raises CorruptObject when they are wrong every time; MissingObject, SourceUnavailable.
    """
    for _ in range(NUM_ATTEMPTS):
        # What a killed process left may be a link to an object: never write into it.
        target.unlink(missing_ok=True)
        try:
            found = objects.fetch(md5, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        if found == md5:
            return
    target.unlink()
    raise _corrupt(objects.address(md5), md5, found)


def md5_of(path: Path) -> str:
    """Hex md5 of a file's bytes."""
    with path.open("rb") as file:
        return _copy(file, None)


class FolderObjects:
    """Objects in a folder, hard-linked where that is safe unless `links` is False."""

    def __init__(self, folder: Path, *, links: bool = True) -> None:
        self._folder, self._links = folder / "files" / "md5", links

    def path(self, name: str) -> Path:
        """Where an object is."""
        return self._folder / name[:2] / name[2:]

    def address(self, name: str) -> str:
        """See `Objects`."""
        return str(self.path(name))

    def exists(self, name: str) -> bool:
        """See `Objects`."""
        return self.path(name).is_file()

    def lacking(self, sizes_bytes: Mapping[str, int]) -> list[str]:
        """See `Objects`."""
        return [name for name, size in sizes_bytes.items() if not self.exists(name) or self._size(name) != size]

    def _size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def put(self, name: str, source: Path) -> None:
        """See `Objects`."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            shutil.copyfile(source, partial)
            partial.chmod(0o444)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """See `Objects`."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            raise _missing(self.address(name)) from None

    def fetch(self, name: str, target: Path) -> str:
        """See `Objects`. Write-protected objects on the same file system are hard-linked.

        Others are copied, for their owner could change them under us.
        """
        source = self.path(name)
        try:
            with source.open("rb") as original:
                is_protected = os.fstat(original.fileno()).st_mode & 0o222 == 0
                if self._links and is_protected and _link(source, target):
                    return _copy(original, None)
                with target.open("wb") as copy:
                    found = _copy(original, copy)
        except FileNotFoundError:
            raise _missing(self.address(name)) from None
        target.chmod(0o444)
        return found


class S3Objects:
    """Objects below `s3://bucket/prefix`; endpoint and credentials as boto3 finds them, unless `options` name them."""

    def __init__(self, url: str, *, attempts: int = 5, **options: str) -> None:
        # Here, because boto3 is slow to import and most sources are folders.
        from data import s3

        self._s3, self._url, self._client = s3, url.rstrip("/"), None
        bucket, _, prefix = self._url.removeprefix(s3.SCHEME).partition("/")
        self._bucket, self._prefix = bucket, f"{prefix}/files/md5" if prefix else "files/md5"
        try:
            self._client = s3.connect(attempts=attempts, **options)
        except s3.FAILURES as error:
            raise self._unavailable(error) from error

    def address(self, name: str) -> str:
        """See `Objects`."""
        return f"{self._url}/files/md5/{name[:2]}/{name[2:]}"

    def exists(self, name: str) -> bool:
        """See `Objects`."""
        try:
            # Not the request for the head alone, whose refusal has no body that says why.
            self._open(name).close()
        except MissingObject:
            return False
        except self._s3.FAILURES as error:
            raise self._unavailable(error) from error
        return True

    def lacking(self, sizes_bytes: Mapping[str, int]) -> list[str]:
        """See `Objects`."""
        assert self._client is not None
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            rows = (row for page in pages for row in page.get("Contents", []))
            there = {row["Key"].removeprefix(f"{self._prefix}/").replace("/", ""): row["Size"] for row in rows}
        except self._s3.FAILURES as error:
            raise self._unavailable(error) from error
        return [name for name, size in sizes_bytes.items() if there.get(name) != size]

    def put(self, name: str, source: Path) -> None:
        """See `Objects`."""
        assert self._client is not None
        try:
            with source.open("rb") as file:
                self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{name[:2]}/{name[2:]}", Body=file)
        except self._s3.FAILURES as error:
            raise self._unavailable(error) from error

    def read(self, name: str) -> bytes:
        """See `Objects`."""
        content = io.BytesIO()
        self._get(name, content)
        return content.getvalue()

    def fetch(self, name: str, target: Path) -> str:
        """See `Objects`."""
        with target.open("wb") as file:
            found = self._get(name, file)
        target.chmod(0o444)
        return found

    def _get(self, name: str, sink: BinaryIO) -> str:
        """Write an object to the sink and return its md5, beginning anew when the body breaks off."""
        for attempt in range(_NUM_BODY_ATTEMPTS):
            sink.seek(0)
            sink.truncate()
            try:
                return _copy(self._open(name), sink)
            except self._s3.FAILURES as error:
                if attempt == _NUM_BODY_ATTEMPTS - 1 or self._s3.is_final(error):
                    raise self._unavailable(error) from error
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def _open(self, name: str) -> Any:
        assert self._client is not None
        try:
            return self._s3.get(self._client, self._bucket, f"{self._prefix}/{name[:2]}/{name[2:]}")["Body"]
        except self._client.exceptions.NoSuchKey:
            raise _missing(self.address(name)) from None

    def _unavailable(self, error: Exception) -> SourceUnavailable:
        return SourceUnavailable(f"{self._url}: {self._s3.explain(error, self._client)}")


def _link(source: Path, target: Path) -> bool:
    """Try a hard link: it fails across file systems, and where the owner differs and the kernel protects links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def _copy(original: Any, copy: BinaryIO | None) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := original.read(CHUNK_BYTES):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest()


def _missing(address: str) -> MissingObject:
    return MissingObject(
        f"{address}: not in this source. `speck data push`, where the version is current and whole, sends what is "
        "lacking; without it, prepare the dataset again"
    )


def _corrupt(address: str, expected: str, found: str) -> CorruptObject:
    return CorruptObject(
        f"{address}: expected md5 {expected}, found {found}. Delete this object; then `speck data push`, where the "
        "version is current and whole, sends it again, or `speck data pull` fetches it into this cache"
    )

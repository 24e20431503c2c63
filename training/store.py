"""Where one run's records lie: objects by name, in a shared folder or below a prefix of an S3 bucket.

    StorageUnavailable (OSError)   the storage refused, or failed again and again
    |-- StorageFull                there is no room
    `-- StorageDamaged             an object's bytes are not those the storage says it has

What is final is told at once; what may pass is tried again for PATIENCE_S, with growing pauses.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from data.label_files import is_safe_name
from data.whole_file import whole_file, write_whole

# Written last and deleted first: what lies beside it is whole.
MANIFEST = "manifest.json"
# No attempt begins later than this after an operation's first one, and longer only for its bytes. The last attempt
# itself can take five minutes where a server takes requests and never answers: see `data.s3.connect`.
PATIENCE_S = 60.0
SLOWEST_BYTES_PER_S = 2**20
MAX_PAUSE_S = 10.0
_FIRST_PAUSE_S = 0.2
_S3 = "s3://"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}

Answer = TypeVar("Answer")


class StorageUnavailable(OSError):
    """The storage refused, or failed again and again. The message says where, what, why and the remedy; no secret."""


class StorageFull(StorageUnavailable):
    """There is no room, or no quota, for what was to be written; nothing of it is left."""


class StorageDamaged(StorageUnavailable):
    """What came has another size or checksum than the storage says that it has, every time."""


class UnsupportedStorage(ValueError):
    """No address of a storage."""


class Stored(NamedTuple):
    """How large an object is, and a mark that another content does not have."""

    size_bytes: int
    mark: str


class RunStore(Protocol):
    """One run's records: objects by name relative to the run, such as `journal/001-000000012.json`.

    Every method raises StorageUnavailable, and ValueError for a name that is none.
    """

    url: str

    def read(self, name: str) -> bytes:
        """An object's content. Raises FileNotFoundError."""

    def write(self, name: str, content: bytes) -> None:
        """Write an object, so that a reader sees the old one or the whole new one."""

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects below `prefix/`, sorted; of what is half written nothing."""

    def listing(self, prefix: str = "") -> dict[str, Stored]:
        """What lies below `prefix/`, by name."""

    def upload(self, folder: Path, name: str, *, last: str) -> None:
        """Put every file of a folder at `name/`, in the place of what was there; the file `last` after all others.

        Hidden files, which begin with a dot, stay behind.
        Where that one is there, all are, and on the disk. Of an upload without room nothing stays.
        """

    def download(self, name: str, folder: Path) -> Path:
        """Bring everything below `name/` into a folder, which is made; returns where it lies.

        That may be another place, which is not to be written into. Raises FileNotFoundError if there is nothing.
        """

    def delete(self, name: str) -> None:
        """Delete an object, or everything below `name/`, manifests first; nothing there is fine."""


def open_store(url: str) -> RunStore:
    """The records of the run whose folder or `s3://bucket/prefix` this is. Nothing is asked or made yet.

    Raises:
        UnsupportedStorage: neither of the two.
        StorageUnavailable: no client can be made for the S3 service.
    """
    if is_s3(url):
        # Here, because boto3 is slow to import, and nodes with a shared folder need none.
        from training.s3_store import S3Store

        return S3Store(url.rstrip("/"))
    if not url or "://" in url:
        shown = re.sub(r"//.*@", "//", url)
        raise UnsupportedStorage(f"storage {shown!r}: must be a folder or s3://bucket/prefix. Use one of these")
    return FolderStore(Path(url).expanduser().absolute())


def is_s3(url: str) -> bool:
    """Whether this is `s3://bucket/prefix`."""
    return re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+/.+", url) is not None and is_safe_name(url.removeprefix(_S3))


class FolderStore:
    """Records in a folder, which every node sees at the same path."""

    def __init__(self, folder: Path) -> None:
        self.url, self._folder = str(folder), folder

    def read(self, name: str) -> bytes:
        """See `RunStore`."""
        path = self._path(name)
        with self._told(name):
            content = _patiently(lambda: _content(path))
        if content is None:
            raise missing(self.url, name)
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `RunStore`."""
        path = self._path(name)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)

        with self._told(name):
            _patiently(write)

    def exists(self, name: str) -> bool:
        """See `RunStore`."""
        path = self._path(name)
        with self._told(name):
            return _patiently(path.is_file)

    def names(self, prefix: str = "") -> list[str]:
        """See `RunStore`."""
        return sorted(self.listing(prefix))

    def listing(self, prefix: str = "") -> dict[str, Stored]:
        """See `RunStore`."""
        folder = self._path(prefix) if prefix else self._folder
        with self._told(prefix):
            found = _patiently(lambda: list(_stored(folder)))
        return {path.relative_to(self._folder).as_posix(): stored for path, stored in found}

    def upload(self, folder: Path, name: str, *, last: str) -> None:
        """See `RunStore`."""
        target = self._path(name)
        files = files_to_upload(folder, last)
        self.delete(name)
        try:
            with self._told(name):
                for path in files:
                    _patiently(lambda path=path: _copy(path, target / path.relative_to(folder)))  # type: ignore[misc]
        except StorageFull:
            with suppress(StorageUnavailable):
                self.delete(name)
            raise

    def download(self, name: str, folder: Path) -> Path:
        """See `RunStore`: nothing is copied."""
        del folder
        path = self._path(name)
        if not path.is_dir():
            raise missing(self.url, f"{name}/")
        return path

    def delete(self, name: str) -> None:
        """See `RunStore`."""
        path = self._path(name)
        with self._told(name):
            _patiently(lambda: _remove(path))

    def _path(self, name: str) -> Path:
        return self._folder / require_name(name)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageUnavailable):
                raise
            place = f"{self.url}/{name}: {error.strerror or error}"
            if error.errno in _FULL:
                raise StorageFull(f"{place}. Free some space there (`speck gc`) or raise the quota") from error
            remedy = "Check that the shared folder is mounted on this node"
            if error.errno in _FORBIDDEN:
                remedy = "Let the user who runs the workers write there"
            raise StorageUnavailable(f"{place}. {remedy}, then run the same again") from error


def require_name(name: str) -> str:
    """The name without a slash at its end, if it can be one of an object. Raises ValueError."""
    name = name.removesuffix("/")
    if not is_safe_name(name) or any(part.startswith(".") or not part for part in name.split("/")):
        raise ValueError(f"{name!r} is no name of a record: use parts between slashes, none empty or with a dot first")
    return name


def missing(url: str, name: str) -> FileNotFoundError:
    """The error for an object that is not there."""
    return FileNotFoundError(f"{url}/{name}: there is none")


def files_to_upload(folder: Path, last: str) -> list[Path]:
    """All files below a folder but hidden ones, `last` at the end. Raises FileNotFoundError when that is missing."""
    if not (folder / last).is_file():
        raise missing(str(folder), last)
    return sorted((path for path, _ in _stored(folder)), key=lambda path: (path == folder / last, path))


def repeated(call: Callable[[], Answer], passes: Callable[[Exception], bool], num_bytes: int = 0) -> Answer:
    """What `call` returns, which moves so many bytes; called again after an exception that `passes`, see PATIENCE_S."""
    deadline, pause_s = time.monotonic() + PATIENCE_S + num_bytes / SLOWEST_BYTES_PER_S, _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:
            if not passes(error) or time.monotonic() + pause_s > deadline:
                raise
        # The nodes of a cluster must not all ask again at once.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _patiently(call: Callable[[], Answer]) -> Answer:
    return repeated(call, lambda error: isinstance(error, OSError) and error.errno in _PASSING)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as content, whole_file(target) as copy:
        shutil.copyfileobj(content, copy, 2**20)


def _stored(folder: Path) -> Iterator[tuple[Path, Stored]]:
    def told(error: OSError) -> None:
        # What is gone meanwhile was deleted; a folder that cannot be read must not look like an empty one.
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, _, names in os.walk(folder, onerror=told):
        for name in names:
            # Half-written files begin with a dot, as do those that NFS keeps for whoever has a deleted one open.
            if not name.startswith("."):
                with suppress(FileNotFoundError):
                    status = Path(parent, name).stat()
                    yield Path(parent, name), Stored(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")


def _remove(path: Path) -> None:
    if not path.is_dir():
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        return
    for manifest in path.rglob(MANIFEST):
        manifest.unlink(missing_ok=True)
    while path.is_dir():
        with suppress(FileNotFoundError):  # Somebody else deletes the same.
            shutil.rmtree(path)

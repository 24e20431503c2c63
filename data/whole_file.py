"""Files that are there as a whole or not at all, whatever is killed, even the machine."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Not every file system can be told to write a folder's entries down.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}
_SUFFIX = ".partial"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the whole file or none of it; text is written as UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which is on the disk at `path` once the block has ended; an exception leaves nothing."""
    # Two writers of one file must not write into each other's.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            # Or a machine that crashes may keep the new name and lose the content.
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file of this name is one that a killed process did not finish."""
    return name.startswith(".") and name.endswith(_SUFFIX)


def _sync(folder: Path) -> None:
    entries = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entries)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(entries)

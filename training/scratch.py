"""A folder on this node's disk for as long as a process lives: the next one removes what a killed one left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "speck-run-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder below TMPDIR, deleted when the block ends; first those of processes that are gone are deleted."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # Somebody's who lives, or another user's.
            descriptor = _locked(left, fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    folder, descriptor = _make()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Another process may have taken it for one that was left, and deleted it.
        with suppress(FileNotFoundError):
            descriptor = _locked(folder)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _locked(folder: Path, how: int = 0) -> int:
    """A descriptor whose lock ends with the process, however that ends; process ids may be another container's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor

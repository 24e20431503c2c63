"""Archives of somebody else, unpacked so that nothing lands outside the target and nothing fills the disk unseen."""

from __future__ import annotations

import errno
import gzip
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from data.label_files import is_safe_name
from data.problems import ImportRefused

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# Pictures hardly shrink and labels shrink about tenfold; deflate reaches 1,032 on what is nothing but a bomb.
MAX_RATIO = 100
# Below this size an archive of labels alone, or a small sample of plain pictures, may have any ratio.
FREE_OF_RATIO_BYTES = 100 * 2**20
# The largest public detection sets hold about two million pictures and less than a terabyte.
MAX_FILES = 5_000_000
MAX_TOTAL_BYTES = 2**40
# A tar header with the longest names takes a few kilobytes.
_MAX_HEADER_BYTES = 2**20
_CHUNK_BYTES = 2**20
# What zipfile and tarfile raise on damaged files; a RuntimeError is a missing password.
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error,
    EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError,
)  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of an archive which `unpack` reads."""
    return path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .zip, .tar, .tar.gz or .tgz into the new folder `target`, which a failure leaves half full.

    Raises ImportRefused when the archive is damaged or encrypted, when a member leaves the target, is a link, a device
    or a sparse file, or has the name of another, and when all are more than the limits above or the disk allow.
    """
    target.mkdir(parents=True)
    budget = _Budget(archive, target)
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, budget)
        else:
            _unpack_tar(archive, budget)
    except ImportRefused:
        raise
    except (*_DAMAGED, OSError) as error:
        # A damaged zip sends its reader to places before its beginning, which the system calls an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ImportRefused(f"{archive}: damaged, or packed in a way that is not read here: {error}") from error


class _Budget:
    """Writes members one by one and refuses what is too much."""

    def __init__(self, archive: Path, target: Path) -> None:
        self.archive, self.target = archive, target
        self.num_files = self.total_bytes = 0
        packed_bytes = archive.stat().st_size
        self.free_bytes = shutil.disk_usage(target).free
        self.limits = {
            min(self.free_bytes, MAX_TOTAL_BYTES): "than the disk has room for or any dataset needs",
            max(FREE_OF_RATIO_BYTES, MAX_RATIO * packed_bytes): f"than {MAX_RATIO} times the archive's size: a bomb",
        }

    def refuse(self, member: str, rule: str) -> ImportRefused:
        return ImportRefused(f"{self.archive}: {member!r} {rule}. Pack plain files and folders, with relative names")

    def check(self, num_bytes: int) -> None:
        """Refuse when this many bytes more would be too many."""
        for limit_bytes, what in self.limits.items():
            if self.total_bytes + num_bytes > limit_bytes:
                raise ImportRefused(
                    f"{self.archive}: unpacks to more than {limit_bytes} bytes, more {what}. Unpack it yourself"
                )

    def write(self, name: str, content: IO[bytes]) -> None:
        """Write a member's content below the target."""
        self.num_files += 1
        if self.num_files > MAX_FILES:
            raise ImportRefused(f"{self.archive}: holds more than {MAX_FILES} files. Unpack it yourself")
        with self._new_file(name) as file:
            while chunk := content.read(_CHUNK_BYTES):
                self.check(len(chunk))
                self.total_bytes += len(chunk)
                file.write(chunk)

    @contextmanager
    def _new_file(self, name: str) -> Iterator[IO[bytes]]:
        path = self.target / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise self.refuse(name, "has the name of another member") from error
        with file:
            yield file

    def check_name(self, name: str) -> None:
        """Refuse a name that leaves the target."""
        if not is_safe_name(name) or ":" in name.split("/", maxsplit=1)[0]:
            raise self.refuse(name, "leaves the folder it is unpacked into")
        if any(len(part.encode()) > 255 for part in name.split("/")) or len(name.encode()) > 2048:
            raise self.refuse(name[:80], "has too long a name")


def _unpack_zip(archive: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as content:
        members = content.infolist()
        budget.check(sum(member.file_size for member in members))
        for member in members:
            budget.check_name(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.flag_bits & 1:
                raise budget.refuse(member.filename, "is encrypted")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise budget.refuse(member.filename, "is a link or a device")
            if not member.is_dir():
                with content.open(member) as file:
                    budget.write(member.filename, file)


def _unpack_tar(archive: Path, budget: _Budget) -> None:
    is_packed = not archive.name.lower().endswith(".tar")
    with gzip.open(archive) if is_packed else archive.open("rb") as raw:
        stream = _Metered(cast("IO[bytes]", raw), budget)
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as content:
            while (member := stream.header_of(content)) is not None:
                # `tar -C folder .` has a member for the folder itself.
                if member.isdir() and member.name == ".":
                    continue
                budget.check_name(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise budget.refuse(member.name, "is a link, a device or a sparse file")
                budget.check(member.size)
                stream.left_bytes = member.size + _MAX_HEADER_BYTES
                file = content.extractfile(member)
                if file is not None:
                    budget.write(member.name, file)


class _Metered:
    """A stream that gives a header no more than its share: tarfile reads as much as a header claims into memory."""

    def __init__(self, raw: IO[bytes], budget: _Budget) -> None:
        self.raw, self.budget = raw, budget
        self.left_bytes = _MAX_HEADER_BYTES

    def header_of(self, content: tarfile.TarFile) -> tarfile.TarInfo | None:
        """Return the next member of an archive that reads from here; None at its end."""
        self.left_bytes = _MAX_HEADER_BYTES
        # tarfile keeps all members it has seen.
        content.members = []  # type: ignore[attr-defined]
        return content.next()

    def read(self, num_bytes: int) -> bytes:
        self.left_bytes -= num_bytes
        if self.left_bytes < 0:
            raise self.budget.refuse("a member", f"has a header of more than {_MAX_HEADER_BYTES} bytes")
        return self.raw.read(num_bytes)

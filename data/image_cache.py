"""`ImageCache`: decoded pictures at training size, in memory or in one file that processes and later runs share.

One file per split rather than one per picture, measured with 1,500 pictures of 640x360 px on a local disk, microseconds
a picture read at random: from the page cache 75 against 150, from the disk 700 against 1,050.
"""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.augment import Image

# Set in the entry of a picture that is there: its checksum alone may be 0.
_PRESENT = 1 << 32


def picture_folder(store: Path, version: str) -> Path:
    """Return where a node's store keeps decoded pictures of a dataset version; no dataset's name begins with a dot."""
    return store / ".pictures" / version


class ImageCache:
    """Pictures of known sizes (height, width), put once and read as views of memory that forked processes share.

    With `path` all of them are kept in that file, else as many as fit into `max_bytes` of memory. Each has a fixed
    place, so nothing is ever moved or locked: who misses a picture writes it, and two who do write the same bytes.
    An entry of 8 bytes, written after the pixels, holds their CRC-32. Every process compares it once per picture; one
    that differs (a torn write, a damaged or cut file) counts as missing and is written anew.

    Free the file by deleting it: processes that have it open keep what they see. The pixels depend on the decoder, so
    its version belongs into the path.
    """

    def __init__(self, sizes_hw: Sequence[tuple[int, int]], *, max_bytes: int, path: Path | None = None) -> None:
        self._shapes = [(height, width, 3) for height, width in sizes_hw]
        ends = np.cumsum([height * width * 3 for height, width in sizes_hw], dtype=np.int64)
        self.num_kept = len(ends) if path is not None else int(np.searchsorted(ends, max_bytes, side="right"))
        self._places = 8 * len(ends) + np.concatenate(([0], ends))
        self._is_compared = np.zeros(self.num_kept, np.bool_)
        self._name = path or "memory"
        # Nothing at all cannot be mapped.
        size = int(self._places[self.num_kept]) or 1
        if path is None:
            self._fd = os.memfd_create("speck-pictures")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        weakref.finalize(self, os.close, self._fd)
        # Zeros mean "missing", so a new file, and one that was cut short, need nothing but their length.
        if os.fstat(self._fd).st_size != size:
            os.ftruncate(self._fd, size)
        self._bytes = np.frombuffer(mmap.mmap(self._fd, size, prot=mmap.PROT_READ), np.uint8)
        self._entries = self._bytes[: 8 * len(ends)].view(np.uint64)

    def get(self, index: int) -> Image | None:
        """Return picture `index` as a read-only view, or None when it has to be decoded."""
        entry = int(self._entries[index]) if index < self.num_kept else 0
        if not entry:
            return None
        start, end = int(self._places[index]), int(self._places[index + 1])
        # Page faults at random places would read little by little: half the speed of a disk.
        os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_WILLNEED)
        pixels = self._bytes[start:end]
        if not self._is_compared[index]:
            if zlib.crc32(pixels.data) | _PRESENT != entry:
                return None
            self._is_compared[index] = True
        return pixels.reshape(self._shapes[index])

    def put(self, index: int, image: Image) -> None:
        """Keep picture `index`, if there is room for it; a full disk is a warning, for training goes on without."""
        if index >= self.num_kept:
            return
        pixels = np.ascontiguousarray(image)
        try:
            # In calls, not through the mapping: there a full disk is a signal that ends the process.
            written = os.pwrite(self._fd, pixels.data, int(self._places[index]))
            if written == pixels.nbytes:
                entry = np.uint64(zlib.crc32(pixels.data) | _PRESENT)
                os.pwrite(self._fd, entry.tobytes(), 8 * index)
        except OSError as error:
            warnings.warn(
                f"{self._name}: cannot keep decoded pictures ({error.strerror}), so they are decoded again every time. "
                "Free disk space, or raise compute.cache_gib to keep them in memory",
                RuntimeWarning,
                stacklevel=2,
            )

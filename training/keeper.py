"""Puts away what a training reaches, in the background and in order: checkpoints, and the journal's entries."""

from __future__ import annotations

import errno
import secrets
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from training.checkpoint import CHECKPOINTS, Manifest
from training.records import JournalEntry, write_entry
from training.store import MANIFEST, RunStore, StorageDamaged, StorageFull, StorageUnavailable

# Checkpoints in a row that the storage may fail to take before training stops: it must not run for days unkept.
MAX_LOST_IN_A_ROW = 3


class Keeper:
    """The writer of one run's records, on rank 0.

    A checkpoint is written to this node's disk at once, for training changes what it holds, and brought to the storage
    while training goes on. The latest `num_kept` stay there, and the one with the best score. `say` is told of what the
    storage did not take.

    `resumed`: name of the checkpoint that this run goes on from, see `newest_valid`. Those further than that are
    damaged: they push no sound one out, and go when the next is there. What a killed upload left is deleted.
    `here`: the folder on this node's disk, unless that is TMPDIR.
    """

    def __init__(
        self,
        store: RunStore,
        *,
        num_kept: int,
        say: Callable[[str], None],
        resumed: str | None = None,
        here: Path | None = None,
    ) -> None:
        self._store, self._num_kept, self._say, self._here = store, num_kept, say, here
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._under_way: Future[None] | None = None
        self._kept, self._damaged = _known(store, resumed)
        self._entries: list[JournalEntry] = []
        self._lost_in_a_row = 0
        self._lost: StorageUnavailable | None = None

    def keep(self, save: Callable[[Path], Manifest], entry: JournalEntry | None = None, *, can_wait: bool) -> bool:
        """Keep what `save` writes to a folder, and then the entry; False if it was left out.

        One that `can_wait` is left out while another is under way, others wait for that.

        Raises:
            StorageUnavailable: MAX_LOST_IN_A_ROW checkpoints were lost.
        """
        if can_wait and self._under_way is not None and not self._under_way.done():
            return False
        self.wait()
        if self._lost_in_a_row >= MAX_LOST_IN_A_ROW and self._lost is not None:
            raise self._lost
        saved = self._saved(save)
        if saved is not None or entry is not None:
            self._under_way = self._pool.submit(self._put, saved, entry)
        return saved is not None

    def _saved(self, save: Callable[[Path], Manifest]) -> tuple[Path, Manifest] | None:
        """The checkpoint on this node's disk, None if that is full."""
        folder: Path | None = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="speck-checkpoint-", dir=self._here))
            return folder, save(folder)
        except BaseException as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, OSError) or error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
        self._lose(
            StorageFull(f"{tempfile.gettempdir()}: no room for a checkpoint on this node's disk. Free some space")
        )
        return None

    def wait(self) -> None:
        """Wait for what is under way."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """Wait for what is under way, and try once more what the journal lacks."""
        self._pool.shutdown(wait=True)
        self._write_entries()

    def _put(self, saved: tuple[Path, Manifest] | None, entry: JournalEntry | None) -> None:
        # What waits is of earlier epochs, which training does not pass again once this checkpoint is there.
        self._write_entries()
        if saved is not None:
            self._bring(*saved)
        if entry is not None:
            self._entries.append(entry)
        self._write_entries()

    def _bring(self, folder: Path, manifest: Manifest) -> None:
        try:
            # No two have one name, for a step may be reached twice.
            name = f"{CHECKPOINTS}/{manifest.step:09d}-{secrets.token_hex(3)}"
            self._store.upload(folder, name, last=MANIFEST)
            self._kept[name] = manifest
            self._lost_in_a_row = 0
        except StorageUnavailable as error:
            self._lose(error)
        else:
            self._tidy_up()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tidy_up(self) -> None:
        try:
            for old in [*self._damaged, *_surplus(self._kept, self._num_kept)]:
                self._store.delete(old)
                self._kept.pop(old, None)
                self._damaged.discard(old)
        except StorageUnavailable as error:
            self._say(f"an old checkpoint stays: {error}")

    def _lose(self, error: StorageUnavailable) -> None:
        self._lost, self._lost_in_a_row = error, self._lost_in_a_row + 1
        self._say(f"a checkpoint is lost, {self._lost_in_a_row} of {MAX_LOST_IN_A_ROW} in a row: {error}")

    def _write_entries(self) -> None:
        while self._entries:
            try:
                write_entry(self._store, self._entries[0])
            except StorageUnavailable as error:
                self._say(f"the journal waits: {error}")
                return
            del self._entries[0]


def _known(store: RunStore, resumed: str | None) -> tuple[dict[str, Manifest], set[str]]:
    """The checkpoints that are there up to `resumed`, by name, and the names of those further than that.

    Those without a readable manifest are neither.
    """
    known: dict[str, Manifest] = {}
    names = store.names(CHECKPOINTS)
    for folder in sorted({"/".join(name.split("/")[:2]) for name in names if name.count("/") > 1}):
        if f"{folder}/{MANIFEST}" not in names:
            with suppress(StorageUnavailable):
                store.delete(folder)
            continue
        with suppress(FileNotFoundError, ValueError, StorageDamaged):
            known[folder] = Manifest.model_validate_json(store.read(f"{folder}/{MANIFEST}"))
    by_step = sorted(known, key=lambda folder: (known[folder].step, folder))
    furthest = f"{CHECKPOINTS}/{resumed}"
    num_kept = by_step.index(furthest) + 1 if furthest in known else 0
    return {folder: known[folder] for folder in by_step[:num_kept]}, set(by_step[num_kept:])


def _surplus(kept: dict[str, Manifest], num_kept: int) -> list[str]:
    """Names of those that are neither among the latest nor the best, oldest first."""
    by_step = sorted(kept, key=lambda name: (kept[name].step, name))
    scored = [name for name in by_step if kept[name].score is not None]
    best = max(scored, key=lambda name: (kept[name].score, kept[name].step), default=None)
    return [name for name in by_step[:-num_kept] if name != best]

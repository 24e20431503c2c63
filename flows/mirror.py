"""A run's folder on this machine and its records on S3, where `SPECK_STORAGE` has the cluster keep them.

Everything in flows reads folders. Unset, the cluster writes into the folder itself and nothing here does anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from data.whole_file import write_whole
from flows.settings import Settings
from training.checkpoint import CHECKPOINTS
from training.records import RESULT, supersede, training_id
from training.requests import stop_name
from training.run import WARM_START
from training.state import warm_start_path
from training.store import MANIFEST, FolderStore, RunStore, Stored, open_store

if TYPE_CHECKING:
    from training.s3_store import S3Store

# In the folder: what lies there, and as which of the storage's versions.
INDEX = ".mirror.json"
ATTEMPTS = "attempts"
SUPERSEDED = "superseded"
_NUM_THREADS = 8
_STAYS = {CHECKPOINTS, WARM_START, stop_name(1).partition("/")[0]}


def is_record(name: str) -> bool:
    """Whether an object of a run is brought to this machine: all but what is large or for workers.

    Of checkpoints that is the manifest, which says how far the run is.
    """
    return name.partition("/")[0] not in _STAYS or (name.startswith(f"{CHECKPOINTS}/") and name.endswith(MANIFEST))


def mirror(store: RunStore, folder: Path, wanted: Callable[[str], bool] = is_record) -> list[str]:
    """Make a folder hold what a store does, and return the names of what was brought; `result.json` comes last.

    What was brought before and has changed or gone since is brought anew or deleted. A folder is made only for files.

    Raises:
        StorageUnavailable: the store does not answer; the folder is as it was, or further.
    """
    known = _read_index(folder)
    there = {name: stored for name, stored in store.listing().items() if wanted(name)}
    gone = known.keys() - there.keys()
    lacking = [name for name in sorted(there) if known.get(name) != there[name] or not (folder / name).is_file()]
    for name in gone:
        (folder / name).unlink(missing_ok=True)

    def bring(name: str) -> str | None:
        try:
            content = store.read(name)
        except FileNotFoundError:  # Since it was listed.
            return None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, content)
        return name

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        brought = [name for name in pool.map(bring, (name for name in lacking if name != RESULT)) if name is not None]
    brought += [name for name in (RESULT,) if name in lacking and bring(name) is not None]
    if brought or gone:
        known = {name: stored for name, stored in known.items() if name in there}
        _write_index(folder, known | {name: there[name] for name in brought})
    return brought


def pull_all(settings: Settings) -> None:
    """Bring what is new of all runs in storage, and of the trainings that were put aside. Raises StorageUnavailable."""
    if settings.storage_url is None:
        return
    root = _root(settings)
    attempts = [name for name in root.names() if _is_attempt(f"/{name}")]
    for place in sorted({name.partition(f"/{ATTEMPTS}/")[0] for name in attempts}):
        is_aside = place.startswith(f"{SUPERSEDED}/")
        mirror(root.below(place), (settings.storage.parent if is_aside else settings.storage) / place)


class Mirror:
    """One run's folder and its records in storage.

    Every method raises StorageUnavailable.
    """

    def __init__(self, settings: Settings, run_key: str) -> None:
        self.folder = settings.storage / run_key
        self.url = f"{settings.storage_url or settings.storage}/{run_key}"
        self._root = None if settings.storage_url is None else _root(settings)
        self._store = None if self._root is None else self._root.below(run_key)

    def pull(self, *, afresh: bool = False) -> None:
        """Bring what is new; `afresh`: also what was brought before, in case it is damaged here."""
        if self._store is not None:
            if afresh:
                (self.folder / INDEX).unlink(missing_ok=True)
            mirror(self._store, self.folder)

    def pull_numbers(self) -> None:
        """Bring the attempts of trainings that were put aside: their numbers must not be given away again."""
        if self._root is not None:
            aside = self._root.below(f"{SUPERSEDED}/{self.folder.name}")
            mirror(aside, self.folder.parent.parent / aside.url.removeprefix(f"{self._root.url}/"), _is_attempt)

    def push(self, *names: str) -> None:
        """Put files in storage, in this order; of a folder all that is in it, in the place of what was there."""
        if self._store is None:
            return
        known = _read_index(self.folder)
        for name in names:
            path = self.folder / name
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            written = sorted(file.relative_to(self.folder).as_posix() for file in files)
            for one in written:
                self._store.write(one, (self.folder / one).read_bytes())
            for old in {*self._store.names(name)} - {*written}:
                self._store.delete(old)
                known.pop(old, None)
            there = self._store.listing()
            known |= {one: there[one] for one in written if one in there}
        _write_index(self.folder, known)

    def push_warm_start(self, weights: str) -> None:
        """Put the weights named `sha256:<hex>` where workers look for them, unless they are there."""
        path = warm_start_path(self.folder.parent, weights)
        if self._store is not None and not self._store.exists(f"{WARM_START}/{path.name}"):
            self._store.write(f"{WARM_START}/{path.name}", path.read_bytes())

    def delete(self, name: str) -> None:
        """Delete an object, or all that is below the name, in storage and here."""
        if self._store is not None:
            self._store.delete(name)
        FolderStore(self.folder).delete(name)

    def size_bytes(self, name: str) -> int:
        """How much lies below `name/` in storage and not here."""
        if self._store is None:
            return 0
        return sum(stored.size_bytes for one, stored in self._store.listing(name).items() if not is_record(one))

    def put_aside(self) -> Path:
        """Put a training aside so that the run can be trained anew; returns where it lies now, here.

        In storage it lies below `superseded/` from then on, without its checkpoints: nothing reads them again.
        """
        if self._root is not None and self._store is not None:
            self.pull()
            aside = self._root.below(f"{SUPERSEDED}/{self.folder.name}/{training_id(self.folder)}")
            names = self._store.names()
            for name in names:
                if is_record(name) and not name.startswith(f"{CHECKPOINTS}/"):
                    aside.write(name, (self.folder / name).read_bytes())
            # Until the attempts are gone, at the end, the plan knows that this was cut short.
            parts = {name.partition("/")[0] for name in names} - {RESULT, CHECKPOINTS, ATTEMPTS}
            for part in (RESULT, CHECKPOINTS, *sorted(parts), ATTEMPTS):
                self._store.delete(part)
            (self.folder / INDEX).unlink(missing_ok=True)
        return supersede(self.folder)


@lru_cache(maxsize=1)
def _root(settings: Settings) -> S3Store:
    from training.s3_store import S3Store

    store = open_store(str(settings.storage_url))
    assert isinstance(store, S3Store)
    return store


def _is_attempt(name: str) -> bool:
    return f"/{ATTEMPTS}/" in name


def _read_index(folder: Path) -> dict[str, Stored]:
    try:
        return {name: Stored(*stored) for name, stored in json.loads((folder / INDEX).read_bytes()).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def _write_index(folder: Path, known: dict[str, Stored]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / INDEX, json.dumps(known, sort_keys=True))

"""What lies on the disks of this machine that no run and no version needs, and freeing it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from stat import S_ISREG

from data.importing import remove
from data.store_room import remove as remove_version
from data.store_room import stored_versions
from data.unneeded import current_versions, killed_imports, remove_leftover, unneeded_versions
from data.versioning import one_writer
from flows.evaluate import SCRATCH
from flows.lease import EXPIRES_AFTER_S
from flows.mirror import Mirror
from flows.settings import Settings
from tracking.client import connect, database
from tracking.registry import all_versions
from tracking.runs import TRAINING
from training.checkpoint import CHECKPOINTS
from training.records import Attempt, CorruptResult, RunResult, read_result
from training.spec import RunSpec

# What is younger may belong to something that is just beginning.
MIN_AGE_S = 3600.0


class RunsAtWork(RuntimeError):
    """Cells are being trained on this storage."""


class UnreadableRecord(RuntimeError):
    """A record says what a run needs and cannot be read, so that nothing may be freed."""


@dataclass(frozen=True)
class Garbage:
    """Something nobody needs. `free` deletes it and says whether it did; what is in use meanwhile stays.

    `is_only_copy`: a dataset version that no remote is known to have. `remote_bytes` lie on S3.
    """

    kind: str
    name: str
    paths: tuple[Path, ...]
    free: Callable[[], bool] = field(compare=False)
    is_only_copy: bool = False
    remote_bytes: int = 0


@dataclass(frozen=True)
class Freed:
    """One kind of garbage: how many there are, their names, and the disk space that deleting all garbage frees."""

    count: int
    names: list[str]
    size_bytes: int


@dataclass(frozen=True)
class _Needs:
    versions: set[str]
    warm_starts: set[str]
    trainings: set[str]


def find_garbage(settings: Settings, repo: Path, store: Path) -> list[Garbage]:
    """What no run in storage, no version in dvc.lock and no registered version needs.

    Runs under another SPECK_HOME are not seen: where several share a checkout, its DVC cache is theirs as well.

    A run needs its dataset version and the weights it starts from; until it has a sound result, its checkpoints too.
    Of a training that was put aside, the records of its attempts stay: their numbers must not be given away again.

    Raises:
        TrackingUnavailable: the registry cannot be asked.
        UnreadableRecord: a run does not say what it needs.
        VersioningFailed: dvc.lock is damaged.
        StorageUnavailable: the storage of runs on S3 does not answer.
    """
    needs = _needs(settings, repo)
    found = [*_store(store, needs.versions), *_cache(repo, needs.versions), *_runs(settings, needs)]
    found += _leftovers(repo)
    newest_s = time.time() - MIN_AGE_S
    return [garbage for garbage in found if _changed_s(garbage.paths) < newest_s]


def free(garbage: Iterable[Garbage], settings: Settings, repo: Path, store: Path) -> list[Garbage]:
    """Delete what is garbage still, the same files, and return what was deleted.

    Raises: see `find_garbage`; RunsAtWork while a flow holds a cell.
    """
    leases = (settings.home / "leases").glob("*.json")
    for path in leases:
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < EXPIRES_AFTER_S:
                raise RunsAtWork(f"{path.stem} is being worked on. Free space when no flow runs, or stop it")
    chosen = set(garbage)
    with one_writer(repo):
        # Looked at anew: a version may have been restored since, or be needed by a run that began.
        return [one for one in find_garbage(settings, repo, store) if one in chosen and one.free()]


def by_kind(garbage: Iterable[Garbage]) -> dict[str, Freed]:
    """Count garbage by kind; a file with several names counts for the kind of the last one, if all of them go."""
    names: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    links: dict[tuple[int, int], int] = {}
    for one in garbage:
        names.setdefault(one.kind, []).append(one.name)
        sizes[one.kind] = sizes.get(one.kind, 0) + one.remote_bytes
        for path in _files(one.paths):
            with suppress(FileNotFoundError):
                status = path.lstat()
                key = (status.st_dev, status.st_ino)
                links[key] = links.get(key, 0) + 1
                if links[key] == status.st_nlink:
                    sizes[one.kind] += status.st_blocks * 512
    return {kind: Freed(len(found), found, sizes[kind]) for kind, found in names.items()}


def _needs(settings: Settings, repo: Path) -> _Needs:
    versions, warm_starts, trainings = current_versions(repo), set[str](), set[str]()
    for spec in _specs(settings):
        versions.add(spec.dataset.version)
        if spec.training.warm_start is not None:
            warm_starts.add(spec.training.warm_start.removeprefix("sha256:"))
    if settings.mlflow_tracking_uri is not None or database(settings.tracking_uri).is_file():
        for version in all_versions(connect(settings.tracking_uri)):
            versions.add(version.dataset_version)
            trainings.add(version.tags.get(TRAINING, version.run_key))
    return _Needs(versions, warm_starts, trainings)


def _specs(settings: Settings) -> Iterator[RunSpec]:
    """What every run in storage was asked to do, each time."""
    for path in (*settings.storage.glob("*/attempts/*.json"), *settings.storage.glob("*/result.json")):
        record = RunResult if path.name == "result.json" else Attempt
        try:
            yield record.model_validate_json(path.read_bytes()).spec
        except ValueError as error:
            raise UnreadableRecord(
                f"{path}: cannot be read, so nobody knows what the run needs. Delete the run's folder, or restore the "
                "file"
            ) from error


def _store(root: Path, needed: set[str]) -> Iterator[Garbage]:
    for stored in stored_versions(root):
        if stored.version not in needed:
            pictures = [folder for folder in stored.folders if folder.parent.name == ".pictures"]
            kind = "decoded pictures" if len(pictures) == len(stored.folders) else "dataset version in the store"
            yield Garbage(kind, stored.version, stored.folders, partial(remove_version, stored))


def _cache(repo: Path, needed: set[str]) -> Iterator[Garbage]:
    for one in unneeded_versions(needed, repo):
        kind = "dataset version in DVC's cache" + (f", {one.remote}" if one.is_only_copy else "")
        yield replace(_together(kind, one.version, one.paths), is_only_copy=one.is_only_copy)


def _leftovers(repo: Path) -> Iterator[Garbage]:
    for path in killed_imports(repo):
        yield replace(_tree("leftover of a killed import", path), free=partial(remove_leftover, path, repo))


def _runs(settings: Settings, needs: _Needs) -> Iterator[Garbage]:
    for path in sorted((settings.home / "warm_starts").glob("*")):
        if path.stem not in needs.warm_starts:
            yield _tree("warm-start weights", path)
    for run_folder in sorted(path.parent for path in settings.storage.glob("*/result.json")):
        try:
            result = read_result(run_folder)
        except CorruptResult:
            continue  # It is made again from its last checkpoint.
        folders = sorted((run_folder / CHECKPOINTS).glob("*"))
        if result is not None and folders:
            found = _together("checkpoints of a finished run", run_folder.name, folders)
            yield found if settings.storage_url is None else _on_s3(found, Mirror(settings, run_folder.name))
    for folder in sorted((settings.home / "superseded").glob("*/*")):
        rest = [path for path in sorted(folder.iterdir()) if path.name != "attempts"]
        if rest and folder.name not in needs.trainings:
            yield _together("superseded run", folder.name, rest)
    for path in sorted((settings.home / "reproduced").glob("*/runs/*/result.json")):
        yield _tree("finished reproduction", path.parents[2])
    for path in sorted([*settings.storage.glob("*/artifacts.partial"), *settings.storage.glob(f"{SCRATCH}*")]):
        yield _tree("leftover of a killed run", path)


def _on_s3(found: Garbage, mirror: Mirror) -> Garbage:
    def delete() -> bool:
        mirror.delete(CHECKPOINTS)
        return True

    return replace(found, free=delete, remote_bytes=mirror.size_bytes(CHECKPOINTS))


def _tree(kind: str, path: Path) -> Garbage:
    return _together(kind, re.sub(r"^\.", "", path.name), [path])


def _together(kind: str, name: str, paths: list[Path]) -> Garbage:
    def delete() -> bool:
        for path in paths:
            remove(path)
        return True

    return Garbage(kind, name, tuple(paths), delete)


def _changed_s(paths: tuple[Path, ...]) -> float:
    """When the youngest file was changed, or one of the paths, if it is a folder or link, made or renamed.

    A copy's files may be older than the copy. A file's own ctime would tell of every hard link that comes and goes.
    """
    times = [0.0]
    for path in (*paths, *_files(paths)):
        with suppress(FileNotFoundError):
            status = path.lstat()
            times.append(status.st_mtime if S_ISREG(status.st_mode) else max(status.st_mtime, status.st_ctime))
    return max(times)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            yield from (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        else:
            yield path

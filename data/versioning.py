"""`version_dataset`: bring a dataset's prepared files up to date with DVC and return their hash, its version."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.card import load_card

logger = logging.getLogger(__name__)

SHOWN_LINES = 20
WATCH_S = 10.0
_LOCKED = ("unable to acquire lock", "is busy, it is being blocked by")


class VersioningFailed(RuntimeError):
    """DVC failed, and the message ends with its own last lines; or it lacks something, or dvc.lock is damaged."""


class DvcLocked(VersioningFailed):
    """Another DVC process, or what a killed one left behind, holds DVC's lock."""


@dataclass(frozen=True)
class DatasetVersion:
    """One state of a prepared dataset.

    `version`: 32 hex digits, DVC's hash of the directory; `lock_entry`: the stage in dvc.lock, enough to restore the
    files by hash; `regenerated`: whether this call ran the preparation.
    """

    name: str
    version: str
    num_files: int
    size_bytes: int
    lock_entry: dict[str, Any]
    regenerated: bool


def version_dataset(name: str, repo: Path) -> DatasetVersion:
    """Run `dvc repro prepare@<name>` and return the version; when nothing has changed DVC only looks at the files.

    Where the raw data is not, as in a clone that pulled, the version that dvc.lock records is taken as it is.

    One process at a time: others wait. The wait covers a DVC that outlived its killed caller, for it inherits the lock.

    Raises:
        UnknownDataset, InvalidCard: see `load_card`.
        DvcLocked: a DVC process that was not started here holds the lock.
        VersioningFailed: `repo` is no git repository, dvc.lock is damaged, DVC or the preparation failed, or neither
            raw nor prepared data is here.
    """
    load_card(name, repo / "data" / "catalog")
    with one_writer(repo) as lock:
        # A damaged dvc.lock is named before DVC stumbles over it.
        recorded = current_version(name, repo)
        if recorded is not None and not _has_raw(name, repo):
            _require_prepared(name, repo, lock)
            logger.warning("%s: its raw data is not here, so version %s is used as it is", name, recorded.version[:12])
            return recorded
        finished = run_dvc(name, repo, lock, "repro")
        version = current_version(name, repo)
    logger.info("%s", finished.stdout + finished.stderr)
    if version is None:
        raise VersioningFailed(f"dataset {name!r}: DVC succeeded but dvc.lock has no entry {stage_name(name)!r}")
    return DatasetVersion(**vars(version) | {"regenerated": "Running stage" in finished.stdout})


def planned_version(name: str, repo: Path) -> DatasetVersion | None:
    """Return the version that `version_dataset` will return, or None where only preparing the dataset can tell.

    Raises: see `version_dataset`.
    """
    load_card(name, repo / "data" / "catalog")
    with one_writer(repo) as lock:
        if (version := current_version(name, repo)) is None or not _has_raw(name, repo):
            return version
        changes = changes_since_lock(name, repo, lock)
    # Output that is not there is made again, or fetched, and has the same hash.
    return version if all("changed outs" in change for change in changes) else None


def _has_raw(name: str, repo: Path) -> bool:
    return (repo / "data" / "raw" / name).exists()


def _require_prepared(name: str, repo: Path, lock: int) -> None:
    if any("changed outs" in change for change in changes_since_lock(name, repo, lock)):
        raise VersioningFailed(
            f"dataset {name!r}: data/raw/{name} is missing, and data/processed/{name} is not the version of dvc.lock. "
            f"Bring the raw data back, or fetch the version: `speck data pull {name}`"
        )


def changes_since_lock(name: str, repo: Path, lock: int) -> list[Any]:
    """What DVC sees changed since dvc.lock was written."""
    found: list[Any] = json.loads(run_dvc(name, repo, lock, "status", "--json").stdout).get(stage_name(name), [])
    return [change for change in found if isinstance(change, dict)]


def current_version(name: str, repo: Path) -> DatasetVersion | None:
    """Return the version that dvc.lock records, or None; nothing is run and no file is compared.

    Raises VersioningFailed when dvc.lock cannot be read as DVC writes it.
    """
    path = repo / "dvc.lock"
    if not path.is_file():
        return None
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8")).get("stages", {}).get(stage_name(name))
        if entry is None:
            return None
        (output,) = entry["outs"]
        return DatasetVersion(
            name=name,
            version=output["md5"].removesuffix(".dir"),
            num_files=output["nfiles"],
            size_bytes=output["size"],
            lock_entry=entry,
            regenerated=False,
        )
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise VersioningFailed(
            f"{path}: must be as DVC wrote it, but is empty, conflicted or damaged. Restore it: `git checkout dvc.lock`"
        ) from error


def stage_name(name: str) -> str:
    """Return the address of the dataset's stage in dvc.yaml."""
    return f"prepare@{name}"


def run_dvc(
    name: str, repo: Path, lock: int, *command: str, watch: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `dvc <command> prepare@<name>` in the repository, under the lock of `one_writer`.

    `watch` is called every WATCH_S seconds; what it raises stops DVC and is raised.

    Raises VersioningFailed when it fails, and DvcLocked when that is because of another DVC.
    """
    _require_git(repo)
    environment = os.environ | {
        "DVC_NO_ANALYTICS": "1",
        # The stage's `python` must be this interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", *command, stage_name(name)],
        cwd=repo, env=environment, pass_fds=(lock,), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            while True:
                try:
                    output = process.communicate(timeout=WATCH_S if watch else None)
                    break
                except subprocess.TimeoutExpired:
                    if watch is not None:
                        watch()
        except BaseException:
            process.kill()
            raise
    finished = subprocess.CompletedProcess(process.args, process.returncode, *output)
    if finished.returncode != 0:
        raise _failure(name, finished, command[0])
    return finished


def _require_git(repo: Path) -> None:
    # DVC asks for a repository alone; the command `git` serves the user's own commits.
    if not (repo / ".git").exists():
        raise VersioningFailed(
            f"{str(repo)!r}: DVC needs a git repository, and there is no .git in it. "
            "Make one (install git first if the command is missing): `git init && git add -A && git commit -m start`"
        )


@contextmanager
def one_writer(repo: Path) -> Iterator[int]:
    """Hold an exclusive lock and yield its descriptor; every process that inherits it prolongs the lock."""
    folder = repo / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "speck-writer.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another speck or DVC command in this repository")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _failure(name: str, finished: subprocess.CompletedProcess[str], command: str) -> VersioningFailed:
    output = f"{finished.stdout}\n{finished.stderr}"
    last = "\n".join([line for line in output.splitlines() if line.strip()][-SHOWN_LINES:])
    if any(sign in output.lower() for sign in _LOCKED):
        return DvcLocked(
            f"dataset {name!r}: another DVC process is at work in this repository, or one was killed. Let it finish; "
            f"if there is none, remove .dvc/tmp/lock and .dvc/tmp/rwlock. DVC's last lines:\n{last}"
        )
    if f"'{stage_name(name)}'" in last and "not found" in last:
        return VersioningFailed(f"dataset {name!r} has no stage: add it to `datasets` in params.yaml.\n{last}")
    # DVC ends with which stage failed; what the stage said stands before.
    causes = [line for line in last.splitlines() if not line.startswith("ERROR: failed to reproduce")]
    cause = causes[-1].strip() if causes else f"status {finished.returncode}"
    hint = f". `speck data check {name}` tells what is wrong with the raw data" if command == "repro" else ""
    return VersioningFailed(f"dataset {name!r}: `dvc {command} {stage_name(name)}` failed: {cause}{hint}\n{last}")

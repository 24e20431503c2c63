"""The DVC remote of a repository: whether it has a dataset's version, and sending and fetching one."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data.objects import FolderObjects, Objects, SourceUnavailable, fetch_verified, file_list, md5_of, open_objects
from data.versioning import VersioningFailed, current_version, one_writer, run_dvc

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 3
# In the cache's folder, but not among its objects.
PARTIALS = "speck-partial"
_NUM_THREADS = 16
# DVC's options of an S3 remote, and boto3's names for them.
_OPTIONS = {
    "endpointurl": "endpoint_url",
    "region": "region_name",
    "profile": "profile_name",
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
}


class NoRemote(VersioningFailed):
    """The repository names no DVC remote, or one of a kind that cannot be read."""


class NoVersion(VersioningFailed):
    """The dataset has no version yet."""


class PushFailed(VersioningFailed):
    """DVC could not send a version; what arrived stays, and the version is not to be seen before all of it is there."""


class _Remote(NamedTuple):
    url: str
    options: dict[str, str]


def remote_states(versions: dict[str, str | None], repo: Path) -> tuple[dict[str, str], str]:
    """Say of each dataset's version whether the remote has it, and why where it does not answer.

    The states: `in the remote`, `not in the remote`, `no remote`, `the remote does not answer`, and `no version`.
    """
    try:
        # A table is not worth the waiting that a transfer is.
        objects = _open(repo, attempts=2)
        found = {
            name: "no version"
            if version is None
            else "in the remote"
            if objects.exists(f"{version}.dir")
            else "not in the remote"
            for name, version in versions.items()
        }
    except NoRemote:
        return dict.fromkeys(versions, "no remote"), ""
    except SourceUnavailable as error:
        return dict.fromkeys(versions, "the remote does not answer"), str(error)
    return found, ""


def push(name: str, repo: Path) -> str:
    """Send a dataset's current version to the remote, with DVC's record of how it was made, and return the version.

    DVC sends the list of the files last: who looks for the version meanwhile finds nothing.

    Raises:
        NoRemote, NoVersion, SourceUnavailable: there is none; the remote refuses, or does not answer.
        DvcLocked: another DVC is at work.
        PushFailed: DVC failed NUM_ATTEMPTS times, though the remote answers.
    """
    version, objects = _current(name, repo), _open(repo)
    with one_writer(repo) as lock:
        for attempt in range(NUM_ATTEMPTS):
            # Says better than DVC which endpoint, why and what to do, and ends the tries when the remote is gone.
            objects.exists(f"{version}.dir")
            try:
                run_dvc(name, repo, lock, "push", "--run-cache")
            except VersioningFailed as error:
                logger.warning("%s", error)
                if attempt == NUM_ATTEMPTS - 1:
                    objects.exists(f"{version}.dir")
                    raise PushFailed(f"{error}\nWhat arrived is kept: do the same again") from error
            else:
                break
    if not objects.exists(f"{version}.dir"):
        # DVC says it has nothing to do when neither the cache nor the working tree has the files.
        raise PushFailed(
            f"dataset {name!r}: version {version} is neither in the cache nor in data/processed. Prepare it: "
            f"`dvc repro prepare@{name}`"
        )
    return version


def pull(name: str, repo: Path) -> str:
    """Fetch the version that dvc.lock records into the cache, put it into data/processed, and return it.

    Raises: see `fetch_version`; NoRemote, NoVersion; UnversionedChanges: see `data.restore.restore`.
    """
    from data.restore import restore

    version = _current(name, repo)
    with one_writer(repo) as lock:
        fetch_version(version, repo)
        try:
            # The records of other versions, by which `restore` knows them.
            run_dvc(name, repo, lock, "fetch", "--run-cache")
        except VersioningFailed as error:
            logger.warning("earlier versions may be unknown here: %s", error)
    restore(name, version, repo)
    return version


def fetch_version(version: str, repo: Path) -> None:
    """Bring a version from the remote into DVC's cache: what the cache lacks, or has with wrong bytes. The list last.

    Everything is compared with its md5 on the way, which DVC does not do. What arrived stays after a failure.

    Raises:
        NoRemote: there is none that can be read.
        MissingObject, CorruptObject, SourceUnavailable: see `Objects`.
    """
    remote, folder = _open(repo), cache_folder(repo)
    cache, partials = FolderObjects(folder), folder / PARTIALS
    files = file_list(version, remote)
    partials.mkdir(parents=True, exist_ok=True)

    def bring(name: str) -> None:
        target, partial = cache.path(name), partials / name
        if target.is_file() and md5_of(target) == name:
            return
        fetch_verified(remote, name, partial)
        _file(partial, target)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        jobs = [pool.submit(bring, md5) for md5 in sorted(set(files.values()))]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
    os.sync()
    partial = partials / f"{version}.dir"
    partial.unlink(missing_ok=True)
    partial.write_bytes(remote.read(f"{version}.dir"))
    _file(partial, cache.path(f"{version}.dir"))


def cache_folder(repo: Path) -> Path:
    """DVC's cache of a repository."""
    return Path(_config(repo)["cache"].get("dir") or repo / ".dvc" / "cache")


def _file(partial: Path, target: Path) -> None:
    partial.chmod(0o444)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(target)


def _current(name: str, repo: Path) -> str:
    if (found := current_version(name, repo)) is None:
        raise NoVersion(f"dataset {name!r} has no version yet. Prepare it: `dvc repro prepare@{name}`")
    return found.version


def _open(repo: Path, attempts: int = 5) -> Objects:
    remote = _remote(repo)
    scheme, separator, _ = remote.url.partition("://")
    if separator and scheme != "s3":
        raise NoRemote(
            f"DVC remote {remote.url!r}: {scheme}:// cannot be read here. Use a folder or s3://bucket/prefix, or say "
            "`dvc push` and `dvc pull` themselves"
        )
    if not separator:
        # A remote is a second copy: what damages a file of the cache must not reach it through a link.
        return FolderObjects(Path(remote.url), links=False)
    return open_objects(remote.url, attempts=attempts, **remote.options)


def _remote(repo: Path) -> _Remote:
    config = _config(repo)
    if not (name := config["core"].get("remote")):
        raise NoRemote(
            "there is no DVC remote. Name a folder or an S3 prefix: `dvc remote add --default storage s3://bucket/prefix`"
        )
    section = config["remote"].get(name)
    if section is None:
        raise NoRemote(f"the DVC remote {name!r} is not defined. Define it: `dvc remote add {name} s3://bucket/prefix`")
    return _Remote(str(section["url"]), {_OPTIONS[key]: str(section[key]) for key in _OPTIONS if section.get(key)})


def _config(repo: Path) -> Any:
    from dvc.config import Config, ConfigError

    try:
        # Merges the files of the machine, the user and the repository, and makes relative paths absolute.
        return Config(str(repo / ".dvc"))
    except ConfigError as error:
        raise NoRemote(f"{repo / '.dvc'}: {error}. Correct the file") from error

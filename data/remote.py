"""The DVC remote of a repository: whether it has a dataset's version, and sending and fetching one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data.objects import FolderObjects, Objects, SourceUnavailable, fetch_verified, file_list, md5_of, open_objects
from data.versioning import VersioningFailed, current_version, one_writer, run_dvc

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 3
IN_REMOTE = "in the remote"
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


def remote_states(versions: Mapping[str, str | None], repo: Path) -> tuple[dict[str, str], str]:
    """Say of each dataset's version whether the remote has it, and why where it does not answer.

    The states: `in the remote`, `not in the remote`, `no remote`, `the remote does not answer`, and `no version`.
    """
    try:
        # A table is not worth the waiting that a transfer is.
        return _states(versions, _open(repo, attempts=2)), ""
    except NoRemote:
        return dict.fromkeys(versions, "no remote"), ""
    except SourceUnavailable as error:
        return dict.fromkeys(versions, "the remote does not answer"), str(error)


def require_remote_states(versions: Mapping[str, str | None], repo: Path) -> dict[str, str]:
    """The same of a remote that must answer. Raises NoRemote, SourceUnavailable."""
    return _states(versions, _open(repo))


def _states(versions: Mapping[str, str | None], objects: Objects) -> dict[str, str]:
    return {
        name: "no version"
        if version is None
        else IN_REMOTE
        if objects.exists(f"{version}.dir")
        else "not in the remote"
        for name, version in versions.items()
    }


def remote_url(repo: Path) -> str | None:
    """The address of the default remote, None without one."""
    try:
        return _remote(repo).url.rstrip("/")
    except NoRemote:
        return None


def is_cached(name: str, repo: Path) -> bool:
    """Whether DVC's cache has the list of the dataset's current version, so that there is something to send."""
    found = current_version(name, repo)
    return found is not None and FolderObjects(cache_folder(repo)).exists(f"{found.version}.dir")


def push(name: str, repo: Path) -> str:
    """Send a dataset's current version to the remote, with DVC's record of how it was made, and return the version.

    DVC sends the list of the files last: who looks for the version meanwhile finds nothing. Where the list is there it
    takes the files for granted; what the remote has lost of them, or has in another size, is sent here.

    Raises:
        NoRemote, NoVersion, SourceUnavailable: there is none; the remote refuses, does not answer, or no more.
        DvcLocked: another DVC is at work.
        PushFailed: DVC failed NUM_ATTEMPTS times, though the remote answers.
    """
    version, objects = _current(name, repo), _open(repo)
    with one_writer(repo) as lock:
        for attempt in range(NUM_ATTEMPTS):
            # Says better than DVC which endpoint, why and what to do, and ends the tries when the remote is gone.
            objects.exists(f"{version}.dir")
            try:
                # A server that dies meanwhile leaves DVC waiting for ever.
                run_dvc(name, repo, lock, "push", "--run-cache", watch=lambda: objects.exists(f"{version}.dir"))
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
    _repair(version, objects, FolderObjects(cache_folder(repo)))
    return version


def _repair(version: str, remote: Objects, cache: FolderObjects) -> None:
    """Send what the remote lacks of a version whose list it has, as far as the cache has it sound."""
    paths = {md5: cache.path(md5) for md5 in file_list(version, remote).values()}
    sizes_bytes = {md5: path.stat().st_size for md5, path in paths.items() if path.is_file()}
    lacking = remote.lacking(sizes_bytes)
    for md5 in lacking:
        if md5_of(paths[md5]) == md5:
            remote.put(md5, paths[md5])
    if lacking:
        logger.warning("the remote had lost %d objects of version %s; they were sent again", len(lacking), version[:12])


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

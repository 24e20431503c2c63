"""Before training: a dataset version goes where the nodes will look for it."""

from __future__ import annotations

from pathlib import Path

from data.remote import IN_REMOTE, push, remote_url, require_remote_states
from data.versioning import DatasetVersion


def send_version(version: DatasetVersion, data_source: str, repo: Path) -> bool:
    """Push a version to the DVC remote if that is the storage that nodes fetch from; True if it was not there yet.

    Where they fetch from elsewhere (the repository's cache, or a storage that others fill) nothing is done.

    Raises what `data.remote.push` does.
    """
    if "://" not in data_source or remote_url(repo) != data_source.rstrip("/"):
        return False
    if require_remote_states({version.name: version.version}, repo)[version.name] == IN_REMOTE:
        return False
    push(version.name, repo)
    return True

"""What an attempt's code and data were: the commit and what differs from it, who and where, the entry in dvc.lock."""

from __future__ import annotations

import getpass
import logging
import os
import platform
import subprocess
from pathlib import Path

import yaml

from data.versioning import VersioningFailed, current_version, stage_name
from flows.settings import REPO
from tracking.client import redacted
from training.records import DATA_LOCK, DIRTY_DIFF, Attempt, attempt_folder
from training.spec import DatasetSpec
from training.store import FolderStore

log = logging.getLogger(__name__)

MAX_DIFF_BYTES = 2**20
MAX_UNTRACKED = 1000
# Files that may hold a secret, by their names or those of their folders, in any case.
SECRETS = (
    ".env*", "*.pem", "*.p12", "*.pfx", "*key*", "*secret*", "*credential*", "*password*", ".netrc", ".pgpass",
    ".htpasswd", ".ssh", "id_rsa*", "id_ecdsa*", "id_ed25519*",
)  # fmt: skip


def provenance() -> dict[str, str]:
    """Commit, whether the tree differed from it, who and where."""
    commit = _git("rev-parse", "HEAD").strip()
    return {
        "mlflow.source.git.commit": commit or "unknown",
        "speck.dirty": str(bool(_git("status", "--porcelain").strip())) if commit else "unknown",
        "mlflow.user": _user(),
        "mlflow.source.name": "speck train-all",
        "speck.host": platform.node(),
    }


def record_sources(run_folder: Path, attempt: Attempt) -> list[str]:
    """Put on record, in the attempt's folder, what differs from the commit and where the data can be had from.

    Returns the names of what was written.
    """
    folder = attempt_folder(attempt.number)
    texts = {f"{folder}/{DIRTY_DIFF}": dirty_diff(), f"{folder}/{DATA_LOCK}": data_lock(attempt.spec.dataset)}
    written = {name: text for name, text in texts.items() if text}
    for name, text in written.items():
        FolderStore(run_folder).write(name, text.encode())
    return [*written]


def dirty_diff() -> str:
    """What `git diff HEAD` says and the names of untracked files; nothing where the tree is the commit's.

    Ignored files have no part in it. Nor has the content of a file whose name, or folder's, is like one of SECRETS: its
    own name is told. Passwords in URLs are blotted out. What is over MAX_DIFF_BYTES is cut off, and how much that was
    is said.
    """
    secret = [f":(exclude,icase,glob)**/{pattern}{below}" for pattern in SECRETS for below in ("", "/**")]
    diff = redacted(_git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", ".", *secret))
    content = diff.encode()
    if len(content) > MAX_DIFF_BYTES:
        diff = content[:MAX_DIFF_BYTES].decode(errors="ignore")
        diff += f"\n# cut: {len(content)} bytes in all, the first {MAX_DIFF_BYTES} are above\n"
    everything = _git("diff", "HEAD", "--name-only", "-z", "--", ".").split("\0")
    shown = set(_git("diff", "HEAD", "--name-only", "-z", "--", ".", *secret).split("\0"))
    untracked = [name for name in _git("ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
    notes = [f"# left out, for its name is like a secret's: {name}" for name in everything if name not in shown]
    notes += [f"# untracked: {name}" for name in untracked[:MAX_UNTRACKED]]
    notes += [f"# untracked: {len(untracked) - MAX_UNTRACKED} more"] if len(untracked) > MAX_UNTRACKED else []
    return diff + "".join(f"{note}\n" for note in notes)


def data_lock(dataset: DatasetSpec) -> str:
    """A dvc.lock of the dataset's stage alone; nothing where this checkout has another version by now, or none."""
    try:
        version = current_version(dataset.name, REPO)
    except VersioningFailed:
        return ""
    if version is None or version.version != dataset.version:
        return ""
    return yaml.safe_dump({"schema": "2.0", "stages": {stage_name(dataset.name): version.lock_entry}}, sort_keys=False)


def _git(*arguments: str) -> str:
    """What git prints; nothing where it is not, or fails, for which the log has the reason."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, check=False)
    except OSError as error:
        log.warning("what the code was is not on record: %s", error)
        return ""
    if done.returncode:
        log.warning("what the code was is not on record: git: %s", done.stderr.decode(errors="replace").strip())
        return ""
    return done.stdout.decode(errors="replace")


def _user() -> str:
    # A container's user id often has no name.
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())

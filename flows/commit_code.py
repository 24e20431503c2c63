"""The code that trained a run: what lies here if that is it, else a copy of the run's commit."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import models
from flows.settings import REPO
from training.code import training_code_hash

# By the commit's own rule for the hash, which may have been another.
OWN_HASH = """
import sys
from pathlib import Path
import models
from training.code import training_code_hash
print(training_code_hash(Path.cwd(), models.ARCHITECTURES[sys.argv[1]].build.__module__))
"""


class NoSuchCode(LookupError):
    """The code that trained a run cannot be had again."""


@contextmanager
def code_of(code_hash: str, commit: str, *, is_dirty: bool, architecture: str) -> Iterator[Path]:
    """A folder with the code of this hash: the repository, or for the length of the block a copy of the commit.

    Raises NoSuchCode when neither is that code, or the commit is not in the repository.
    """
    row = models.ARCHITECTURES.get(architecture)
    if row is not None and training_code_hash(REPO, row.build.__module__) == code_hash:
        yield REPO
        return
    trained = f"the run was trained by code {code_hash}, which is not what lies here"
    if _git("cat-file", "-e", f"{commit}^{{commit}}").returncode != 0:
        raise NoSuchCode(f"{trained}, and its commit {commit} is not in this repository. Fetch it: `git fetch --all`")
    with tempfile.TemporaryDirectory(prefix="speck-commit-") as folder:
        # Not a worktree: a kill would leave the repository with the record of one.
        archive = _git("archive", "--format=tar", commit)
        if archive.returncode != 0:
            raise NoSuchCode(f"{trained}, and git cannot give out {commit}: {archive.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        found = _own_hash(Path(folder), architecture)
        if found != code_hash:
            why = " The tree had uncommitted changes then: they are in no commit." if is_dirty else ""
            raise NoSuchCode(f"{trained}; its commit {commit[:12]} has {found}.{why} Nothing was trained")
        yield Path(folder)


def environment_of(code: Path) -> dict[str, str]:
    """The environment of a process that runs the code in a folder, without what training has no need of."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    return inherited | {"PYTHONPATH": str(code)}


def _own_hash(code: Path, architecture: str) -> str:
    command = [sys.executable, "-c", OWN_HASH, architecture]
    done = subprocess.run(command, cwd=code, env=environment_of(code), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise NoSuchCode(f"the commit's code does not run with the packages that are installed here: {last}")
    return done.stdout.strip()


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, check=False)

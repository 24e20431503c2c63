"""Storages of runs for tests, in a folder and on a real S3 server, whose objects lie as files on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service

from training.checkpoint import save_checkpoint
from training.store import RunStore, open_store

KINDS = ("folder", "s3")
RUN_KEY = "0123456789ab"


@dataclass(frozen=True)
class Storage:
    """`url` holds runs, as files below `files`; `port` of its server, if it has one."""

    url: str
    files: Path
    port: int = 0

    def open(self, run_key: str = RUN_KEY) -> RunStore:
        """The records of one run."""
        return open_store(f"{self.url}/{run_key}")

    def file(self, name: str, run_key: str = RUN_KEY) -> Path:
        """Where an object lies on this machine."""
        return self.files / run_key / name


@contextmanager
def storage_of(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A new storage whose files lie below `folder`, and the environment in which it can be reached."""
    if kind == "folder":
        yield Storage(str(folder / "runs"), folder / "runs")
        return
    if RCLONE is None:
        pytest.skip(WITHOUT_RCLONE)
    (folder / "served/bucket").mkdir(parents=True)
    with s3_service(folder / "served") as service:
        for name, value in service.environment.items():
            patch.setenv(name, value)
        port = int(service.url.rpartition(":")[2])
        yield Storage("s3://bucket/team/runs", folder / "served/bucket/team/runs", port)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """`folder` is a file system of 4 MiB."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def unfinished_uploads(port: int) -> list[str]:
    """Keys of uploads in parts that the server still waits for; asked of itself, past any proxy."""
    config = Config(s3={"addressing_style": "path"})
    client = boto3.Session().client("s3", endpoint_url=f"http://127.0.0.1:{port}", config=config)
    try:
        return [upload["Key"] for upload in client.list_multipart_uploads(Bucket="bucket").get("Uploads", ())]
    except client.exceptions.NoSuchUpload:
        return []


def make_checkpoint(folder: Path, step: int, size_bytes: int = 10_000, run_key: str = RUN_KEY) -> Path:
    """A checkpoint of random bytes beside its state, all of which the manifest tells."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size_bytes))
    save_checkpoint(folder, run_key=run_key, step=step, epoch=step, tensors={}, state={"step": step})
    return folder


def tree(folder: Path) -> dict[str, str]:
    """sha256 of all files below a folder, by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

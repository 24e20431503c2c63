"""A large artifact goes in parts, and what a killed process left of it is never taken for the whole."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos.processes import wait_until
from services.fault_proxy import FaultProxy, fault_proxy
from services.mlflow_server import mlflow_service
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service

from tracking.client import PART_BYTES, connect
from tracking.runs import SUMS, upload

SIZE_BYTES = 200 * 10**6
NUM_PARTS = -(-SIZE_BYTES // PART_BYTES)
NAME = "weights.safetensors"


@dataclass(frozen=True)
class Served:
    """An MLflow server with artifacts on S3, which it reaches by way of a proxy, as does who sends parts there."""

    url: str
    proxy: FaultProxy

    @property
    def num_parts(self) -> int:
        """Of the large file, that anybody began to send."""
        return sum(n for (kind, path), n in self.proxy.requests.items() if kind == "PUT" and path.endswith(NAME))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    if RCLONE is None:
        pytest.skip(WITHOUT_RCLONE)
    (tmp_path / "served/bucket").mkdir(parents=True)
    (tmp_path / "mlflow").mkdir()
    with ExitStack() as stack:
        s3 = stack.enter_context(s3_service(tmp_path / "served"))
        proxy = stack.enter_context(fault_proxy(int(s3.url.rpartition(":")[2])))
        with pytest.MonkeyPatch.context() as for_server:
            for name, value in (s3.environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
                for_server.setenv(name, value)
            service = stack.enter_context(mlflow_service(tmp_path / "mlflow", artifacts="s3://bucket/mlflow"))
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield Served(service.url, proxy)


def send(uri: str, run_id: str, folder: Path) -> None:
    upload(connect(uri), run_id, folder)


def interrupted(uri: str, run_id: str, folder: Path, begun: Any) -> None:
    """Send the folder from a process that is killed as soon as the large file is under way."""
    process = multiprocessing.get_context("fork").Process(target=send, args=(uri, run_id, folder))
    process.start()
    wait_until(begun, 120, "the large file", every_s=0.001)
    os.kill(int(process.pid or 0), signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a-small-one.txt").write_text("small")
    (tmp_path / "files" / NAME).write_bytes(os.urandom(SIZE_BYTES))
    return tmp_path / "files"


def test_a_killed_upload_of_parts_leaves_nothing_and_the_next_one_all(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    client: Any = connect(served.url)
    run_id = client.create_run("0").info.run_id
    served.proxy.delay_s = 0.1
    interrupted(served.url, run_id, folder, lambda: served.num_parts)
    served.proxy.delay_s = 0.0
    assert NAME not in [file.path for file in client.list_artifacts(run_id)]
    before = served.num_parts
    assert 0 < before < NUM_PARTS
    # The small one is there, but was not put on the list any more.
    assert upload(client, run_id, folder) == 2
    assert served.num_parts - before >= NUM_PARTS
    assert upload(client, run_id, folder) == 0
    (stored,) = (tmp_path / "served/bucket").rglob(NAME)
    require_whole(client, run_id, folder, stored, tmp_path)


@pytest.mark.soak
def test_a_killed_upload_to_a_server_with_a_folder_is_sent_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow").mkdir()
    with mlflow_service(tmp_path / "mlflow") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        client: Any = connect(service.url)
        run_id = client.create_run("0").info.run_id
        artifacts = tmp_path / "mlflow" / "mlartifacts"
        interrupted(service.url, run_id, folder, lambda: [*artifacts.rglob(".artifact.uploading.*")])
        listed = {file.path: file.file_size for file in client.list_artifacts(run_id)}
        assert SUMS not in listed, "what is on no list counts for nothing"
        assert upload(client, run_id, folder) == 2
        require_whole(client, run_id, folder, next(artifacts.rglob(NAME)), tmp_path)


def require_whole(client: Any, run_id: str, folder: Path, stored: Path, tmp_path: Path) -> None:
    sha256 = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == sha256
    sums = Path(client.download_artifacts(run_id, SUMS, str(tmp_path))).read_text()
    assert f"{sha256}  {NAME}\n" in sums

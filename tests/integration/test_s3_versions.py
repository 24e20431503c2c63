"""Dataset versions from a real S3 server, with faults on the way. Skipped where there is no rclone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from conftest import store
from services.fault_proxy import FaultProxy, fault_proxy
from services.s3_server import RCLONE, WITHOUT_RCLONE, S3Service, s3_service

from data.objects import MARKER, CorruptObject, MissingObject, SourceUnavailable
from data.store import materialise

pytestmark = pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
NUM_FILES = 60
SOURCE = "s3://drone/dvc"
CALL = """
import sys
from pathlib import Path
from data.store import materialise
print(materialise("tiny", sys.argv[1], source=sys.argv[2], root=Path(sys.argv[3])))
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Service]:
    (tmp_path / "served").mkdir()
    with s3_service(tmp_path / "served") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield service


@pytest.fixture
def proxy(service: S3Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server, and what the environment names."""
    with fault_proxy(int(service.url.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    (folder / "images").mkdir(parents=True)
    for number in range(NUM_FILES):
        (folder / f"images/{number:03d}.jpg").write_bytes(f"{number} ".encode() * 10_000)
    return folder


@pytest.fixture
def version(service: S3Service, prepared: Path, tmp_path: Path) -> str:
    """A version that lies in the bucket."""
    found = store(prepared, tmp_path / "storage")
    client = boto3.Session().client("s3", config=Config(s3={"addressing_style": "path"}), endpoint_url=service.url)
    client.create_bucket(Bucket="drone")
    for path in (tmp_path / "storage").rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "drone", f"dvc/{path.relative_to(tmp_path / 'storage').as_posix()}")
    return found


def tree(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != MARKER}


def visible(root: Path) -> list[Path]:
    return [path for path in root.glob("*/*") if not path.name.startswith(".")]


def num_objects(proxy: FaultProxy) -> list[int]:
    """How often each object was asked for."""
    return [count for (method, path), count in proxy.requests.items() if method == "GET" and "/files/md5/" in path]


def test_four_processes_fetch_every_object_once(
    proxy: FaultProxy, version: str, prepared: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", CALL, version, SOURCE, str(tmp_path / "node")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = {worker.communicate(timeout=300)[0].strip() for worker in workers}
    assert outputs == {str(tmp_path / "node/tiny" / version)}
    assert tree(Path(outputs.pop())) == tree(prepared)
    assert num_objects(proxy) == [1] * (NUM_FILES + 1)


def test_twenty_percent_of_all_requests_fail(proxy: FaultProxy, version: str, prepared: Path, tmp_path: Path) -> None:
    proxy.failing_share = 0.2
    folder = materialise("tiny", version, source=SOURCE, root=tmp_path / "node")
    assert tree(folder) == tree(prepared)
    assert proxy.num_faults > 5


def test_wrong_bytes_are_fetched_again_but_not_for_ever(
    proxy: FaultProxy, version: str, prepared: Path, tmp_path: Path
) -> None:
    paths = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    endings = [f"/{path.parent.name}/{path.name}" for path in paths]
    proxy.damaged.update({endings[0]: 2, endings[1]: 1, f"{version[2:]}.dir": 1})
    assert tree(materialise("tiny", version, source=SOURCE, root=tmp_path / "node")) == tree(prepared)
    assert not +proxy.damaged
    proxy.damaged[f"{version[2:]}.dir"] = 100
    with pytest.raises(CorruptObject, match=rf"{SOURCE}/files/md5/{version[:2]}/{version[2:]}\.dir: expected md5"):
        materialise("tiny", version, source=SOURCE, root=tmp_path / "other")


def test_what_was_fetched_before_an_interruption_is_not_fetched_again(
    proxy: FaultProxy, version: str, prepared: Path, tmp_path: Path
) -> None:
    path = sorted(path for path in (tmp_path / "storage").rglob("*") if path.is_file() and path.suffix != ".dir")[-1]
    key = f"dvc/{path.relative_to(tmp_path / 'storage').as_posix()}"
    client = boto3.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    client.delete_object(Bucket="drone", Key=key)
    with pytest.raises(MissingObject, match=rf"s3://drone/{key}: not in this source"):
        materialise("tiny", version, source=SOURCE, root=tmp_path / "node")
    assert visible(tmp_path / "node") == []
    num_kept = len(list((tmp_path / "node/tiny").rglob("*.jpg")))
    assert num_kept > 0
    client.upload_file(str(path), "drone", key)
    proxy.requests.clear()
    assert tree(materialise("tiny", version, source=SOURCE, root=tmp_path / "node")) == tree(prepared)
    assert sum(num_objects(proxy)) == NUM_FILES - num_kept + 1


def test_a_killed_process_leaves_nothing_half_visible_and_what_it_fetched(
    proxy: FaultProxy, version: str, prepared: Path, tmp_path: Path
) -> None:
    proxy.delay_s = 0.1
    partial = tmp_path / "node/tiny" / f".{version}.partial"
    process = subprocess.Popen([sys.executable, "-c", CALL, version, SOURCE, str(tmp_path / "node")])
    deadline = time.monotonic() + 300
    while len(list(partial.rglob("*.jpg"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert visible(tmp_path / "node") == []
    proxy.delay_s = 0.0
    proxy.requests.clear()
    assert tree(materialise("tiny", version, source=SOURCE, root=tmp_path / "node")) == tree(prepared)
    assert sum(num_objects(proxy)) < NUM_FILES


def _wrong_secret(monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-secret")


def _unknown_key(monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")


def _gone(monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy) -> None:
    proxy.close()


def _skewed(monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy) -> None:
    proxy.is_skewed = True


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (_wrong_secret, r"SignatureDoesNotMatch.*the credentials \(AWS_ACCESS_KEY_ID"),
        (_unknown_key, r"\(\w+\).*the credentials \(AWS_ACCESS_KEY_ID"),
        (_gone, r"Could not connect.*Check AWS_ENDPOINT_URL and that the server runs"),
        (_skewed, r"RequestTimeTooSkewed.*Set this machine's clock"),
    ],
)
def test_an_error_names_endpoint_cause_and_remedy_and_no_secret(
    proxy: FaultProxy,
    version: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch, FaultProxy], None],
    cause: str,
) -> None:
    spoil(monkeypatch, proxy)
    with pytest.raises(SourceUnavailable, match=rf"(?s){SOURCE}: {proxy.url}: .*{cause}") as caught:
        materialise("tiny", version, source=SOURCE, root=tmp_path / "node")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert visible(tmp_path / "node") == []


@pytest.mark.parametrize("endpoint", ["nonsense", "http://"])
def test_an_endpoint_that_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(SourceUnavailable, match=rf"Invalid endpoint: {endpoint}\. Check the address"):
        materialise("tiny", "0" * 32, source=SOURCE, root=tmp_path)

"""What a run's storage does when a server, a disk or its own process fails."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from services.fault_proxy import FaultProxy
from unit.training.storage import (
    KINDS,
    RUN_KEY,
    Storage,
    make_checkpoint,
    small_disk,
    storage_of,
    tree,
    unfinished_uploads,
)

import training.s3_store
import training.store
from data import s3
from training.checkpoint import MANIFEST, newest_valid, verify_checkpoint
from training.store import RunStore, StorageDamaged, StorageFull, StorageUnavailable, open_store

pytestmark = pytest.mark.slow

UPLOADING = """
import sys
from pathlib import Path
from training.store import open_store
store = open_store(sys.argv[1])
for number in range(10**6):
    name = "abc"[number % 3]
    store.upload(Path(sys.argv[2]) / name, f"checkpoints/{name}", last="manifest.json")
    print(number, flush=True)
"""


def test_twenty_percent_of_all_requests_fail(
    proxy: FaultProxy, bucket: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an operation says it did is done, whole."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(training.s3_store, "PART_BYTES", 5 * 2**20)
    proxy.failing_share = 0.2
    store = bucket.open()
    contents = {f"journal/{number:03d}.json": os.urandom(2_000) for number in range(60)}
    for name, content in contents.items():
        store.write(name, content)
    sources = [make_checkpoint(tmp_path / f"{step}", step, size_bytes=12 * 2**20) for step in range(3)]
    for source in sources:
        store.upload(source, f"checkpoints/{source.name}", last=MANIFEST)
    assert {name: store.read(name) for name in store.names("journal")} == contents
    for source in sources:
        assert tree(store.download(f"checkpoints/{source.name}", tmp_path / "back" / source.name)) == tree(source)
        assert tree(bucket.file(f"checkpoints/{source.name}")) == tree(source)
    store.delete("checkpoints/0")
    assert len(store.names()) == 66
    assert proxy.num_faults > 30
    assert unfinished_uploads(bucket.port) == []


def test_a_server_that_is_away_for_a_while_is_waited_for(proxy: FaultProxy, bucket: Storage) -> None:
    proxy.failing_share = 1.0
    back = threading.Timer(4.0, lambda: setattr(proxy, "failing_share", 0.0))
    back.start()
    bucket.open().write("x", b"1")
    assert bucket.file("x").read_bytes() == b"1"
    back.join()


def _operations(store: RunStore, tmp_path: Path) -> dict[str, Callable[[], object]]:
    source = make_checkpoint(tmp_path / "source", 1)
    return {
        "read": lambda: store.read("x"),
        "write": lambda: store.write("x", b"1"),
        "exists": lambda: store.exists("x"),
        "names": store.names,
        "upload": lambda: store.upload(source, "c", last=MANIFEST),
        "download": lambda: store.download("c", tmp_path / "c"),
        "delete": lambda: store.delete("x"),
        "newest_valid": lambda: newest_valid(store, tmp_path / "into", print),
    }


def test_a_server_that_is_gone_is_an_error(proxy: FaultProxy, bucket: Storage, tmp_path: Path, impatient: None) -> None:
    operations = _operations(bucket.open(), tmp_path)
    proxy.close()
    for name, operation in operations.items():
        cause = rf"{bucket.url}/{RUN_KEY}.*{proxy.url}.*Check AWS_ENDPOINT_URL and that the server runs"
        with pytest.raises(StorageUnavailable, match=cause):
            pytest.fail(f"{name}: {operation()}")


def test_a_server_that_never_answers_is_an_error(
    bucket: Storage, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(s3._CONNECTIONS, "read_timeout", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageUnavailable, match="Read timeout"):
            bucket.open().read("x")


def test_wrong_credentials_are_told_at_once_and_not_shown(
    proxy: FaultProxy, bucket: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-secret")
    for name, operation in _operations(bucket.open(), tmp_path).items():
        proxy.requests.clear()
        cause = r"(?s)SignatureDoesNotMatch.*the credentials \(AWS_ACCESS_KEY_ID"
        with pytest.raises(StorageUnavailable, match=cause) as caught:
            pytest.fail(f"{name}: {operation()}")
        assert "wr0ng-secret" not in str(caught.value)
        assert sum(proxy.requests.values()) == 1


def test_a_flipped_byte_in_an_answer_is_asked_for_again(proxy: FaultProxy, bucket: Storage, tmp_path: Path) -> None:
    store, source = bucket.open(), make_checkpoint(tmp_path / "source", 1)
    store.write("x.json", b"12345")
    store.upload(source, "checkpoints/one", last=MANIFEST)
    proxy.damaged.update({"x.json": 1, "model.safetensors": 2})
    assert store.read("x.json") == b"12345"
    assert tree(store.download("checkpoints/one", tmp_path / "one")) == tree(source)
    assert not +proxy.damaged
    proxy.damaged.update({"x.json": 100, "model.safetensors": 100})
    with pytest.raises(StorageDamaged, match=r"x\.json.* has the ETag"):
        store.read("x.json")
    with pytest.raises(StorageDamaged, match=r"model\.safetensors.* has the ETag"):
        store.download("checkpoints/one", tmp_path / "two")
    assert tree(tmp_path / "two") == {}, "no part of it stays"


def test_what_arrives_damaged_is_sent_again(bucket: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the service's own word for what it has."""
    store, source, sent = bucket.open(), make_checkpoint(tmp_path / "source", 1), [0, 0]
    put, upload = store._client.put_object, store._client.upload_fileobj

    def put_flipped(*, Body: Any, **rest: Any) -> Any:  # noqa: N803
        if Body == b"12345":
            sent[0] += 1
            Body = b"02345" if sent[0] == 1 else Body  # noqa: N806
        return put(Body=Body, **rest)

    def upload_cut(file: Any, *rest: Any, **options: Any) -> None:
        sent[1] += 1
        file.seek(sent[1] == 1)
        upload(file, *rest, **options)

    monkeypatch.setattr(store._client, "put_object", put_flipped)
    monkeypatch.setattr(store._client, "upload_fileobj", upload_cut)
    store.write("x", b"12345")
    assert bucket.file("x").read_bytes() == b"12345"
    store.upload(source, "checkpoints/one", last=MANIFEST)
    assert tree(bucket.file("checkpoints/one")) == tree(source)
    assert sent == [2, 4]


def test_a_file_handle_that_went_stale_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, when another node put a new file in the place of the one that is read."""
    store = open_store(str(tmp_path / RUN_KEY))
    store.write("x", b"1")
    read, failures = Path.read_bytes, [116, 5]

    def stale(path: Path) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert store.read("x") == b"1"
    assert not failures
    failures += [13]
    with pytest.raises(
        StorageUnavailable, match=r"x: Stale file handle\. Let the user who runs the workers write there"
    ):
        store.read("x")
    monkeypatch.setattr(training.store, "PATIENCE_S", 0.0)
    failures += [116]
    with pytest.raises(StorageUnavailable, match="Check that the shared folder is mounted on this node"):
        store.read("x")


def _upload_until_killed(storage: Storage, sources: Path, after_s: float) -> None:
    command = [sys.executable, "-c", UPLOADING, storage.open().url, str(sources)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        time.sleep(after_s)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def _kill_uploads(storage: Storage, tmp_path: Path, num_kills: int) -> None:
    """After every kill: what has a manifest is whole, and the run can go on from it and be written anew."""
    for step, name in enumerate("abc"):
        make_checkpoint(tmp_path / "sources" / name, step, size_bytes=20 * 2**20)
    moments, store, said = random.Random(3), storage.open(), list[str]()
    for kill in range(num_kills):
        _upload_until_killed(storage, tmp_path / "sources", moments.uniform(0, 0.5))
        for name in "abc":
            folder = storage.file(f"checkpoints/{name}")
            if (folder / MANIFEST).is_file():
                verify_checkpoint(folder, RUN_KEY)
        newest = newest_valid(store, tmp_path / f"into-{kill}", said.append)
        assert newest is not None
        assert newest.name in "abc"
        shutil.rmtree(tmp_path / f"into-{kill}", ignore_errors=True)
    assert said == [text for text in said if "its upload did not end" in text]
    store.delete("checkpoints")
    assert store.names() == []
    assert not [path for path in storage.files.rglob("*") if path.is_file()]
    assert storage.port == 0 or unfinished_uploads(storage.port) == []


def test_a_killed_upload_leaves_no_manifest_beside_half_a_checkpoint(storage: Storage, tmp_path: Path) -> None:
    _kill_uploads(storage, tmp_path, num_kills=4)


@pytest.mark.soak
def test_killed_uploads_at_length(storage: Storage, tmp_path: Path) -> None:
    _kill_uploads(storage, tmp_path, num_kills=150)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, kind: str
) -> None:
    """The S3 server of the tests says nothing of the cause."""
    full, cause = (StorageFull, "No space left") if kind == "folder" else (StorageUnavailable, "InternalError")
    with small_disk(tmp_path / "disk"), storage_of(kind, tmp_path / "disk", monkeypatch) as storage:
        store = storage.open()
        good = make_checkpoint(tmp_path / "good", 1, size_bytes=2**21)
        store.upload(good, "checkpoints/good", last=MANIFEST)
        store.write("small.json", b"old")
        large = make_checkpoint(tmp_path / "large", 2, size_bytes=3 * 2**20)
        with pytest.raises(full, match=rf"{RUN_KEY}/checkpoints/large.*{cause}"):
            store.upload(large, "checkpoints/large", last=MANIFEST)
        assert store.names("checkpoints/large") == [], "its room is free again"
        with pytest.raises(full):
            store.write("small.json", bytes(3 * 2**20))
        assert newest_valid(store, tmp_path / "into", pytest.fail) is not None
        assert tree(storage.file("checkpoints/good")) == tree(good)
        assert store.read("small.json") == b"old"
        store.write("small.json", b"new")


def test_a_full_s3_service_is_told_at_once(proxy: FaultProxy, bucket: Storage, tmp_path: Path) -> None:
    store, source = bucket.open(), make_checkpoint(tmp_path / "source", 1)
    store.write("checkpoints/one/old.bin", b"old")
    proxy.is_full = True
    for name, call in {
        "x": lambda: store.write("x", b"1"),
        "checkpoints/one/model.safetensors": lambda: store.upload(source, "checkpoints/one", last=MANIFEST),
    }.items():
        proxy.requests.clear()
        with pytest.raises(StorageFull, match=rf"{bucket.url}/{RUN_KEY}/{name}: .*minimum free drive threshold"):
            call()
        assert sum(count for (method, _), count in proxy.requests.items() if method == "PUT") == 1
    assert store.names() == []


def test_a_node_without_room_says_so(bucket: Storage, tmp_path: Path) -> None:
    store = bucket.open()
    store.upload(make_checkpoint(tmp_path / "large", 2, size_bytes=5 * 2**20), "checkpoints/large", last=MANIFEST)
    with small_disk(tmp_path / "node"):
        with pytest.raises(StorageFull, match=r"no room on this node for s3://.*/checkpoints/large"):
            newest_valid(store, tmp_path / "node/into", pytest.fail)
        assert tree(tmp_path / "node") == {}

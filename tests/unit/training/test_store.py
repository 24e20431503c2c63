"""What a run's storage promises, in a folder and on a real S3 server, and what it does when something fails."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from services.fault_proxy import FaultProxy, fault_proxy
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
from training.store import RunStore, StorageDamaged, StorageFull, StorageUnavailable, UnsupportedStorage, open_store

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


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    with storage_of(request.param, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    with storage_of("s3", tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def proxy(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the S3 server."""
    with fault_proxy(bucket.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.store, "PATIENCE_S", 1.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


def test_objects_are_read_as_they_were_written(storage: Storage) -> None:
    store = storage.open()
    contents = {
        "a.json": b"{}",
        "journal/001-000000012.json": bytes(range(256)),
        "päth with blanks/x": b"",
        "a-b/c": b"1",
    }
    assert store.names() == []
    for name, content in contents.items():
        assert not store.exists(name)
        with pytest.raises(FileNotFoundError, match=f"{RUN_KEY}/{name}: there is none"):
            store.read(name)
        store.write(name, content)
        assert store.exists(name)
    assert {name: store.read(name) for name in contents} == contents
    assert store.names() == sorted(contents)
    store.write("a.json", b"new")
    assert store.read("a.json") == b"new"
    assert storage.open("other").names() == []


def test_names_below_a_prefix_are_those_of_its_parts(storage: Storage) -> None:
    store = storage.open()
    for name in ("journal/1.json", "journal/a/b.json", "journal-old/2.json", "x/journal/3.json"):
        store.write(name, b"1")
    assert store.names("journal") == store.names("journal/") == ["journal/1.json", "journal/a/b.json"]
    assert store.names("journ") == store.names("nothing") == store.names("journal-old/2.json") == []
    for name in ("journ", "journal", "x/journal", "journal-old/2.json/x"):
        assert not store.exists(name)
        with pytest.raises(FileNotFoundError):
            store.read(name)


def test_names_that_leave_the_run_are_refused(storage: Storage, tmp_path: Path) -> None:
    store = storage.open()
    store.write("x", b"1")
    for name in ("", ".", "..", "../x", "a/../b", "/a", "a//b", "a/./b", ".hidden", "a/.x", "a\\b", "a\nb"):
        for call in (store.read, store.exists, store.delete, lambda name: store.write(name, b"2"),
                     lambda name: store.download(name, tmp_path / "there")):  # fmt: skip
            with pytest.raises(ValueError, match="is no name of a record"):
                call(name)
    assert store.names() == ["x"]


@pytest.mark.parametrize(
    "url",
    [
        "", "http://a/b", "file:///a", "s3://", "s3://bucket", "s3://bucket/", "S3://bucket/a", "s3://bucket/../a",
        "s3://key:s3cret@bucket/a",
    ],
)  # fmt: skip
def test_an_address_of_no_storage_is_refused(url: str) -> None:
    with pytest.raises(UnsupportedStorage, match="must be a folder or s3://bucket/prefix") as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)


def test_a_folder_is_absolute_and_s3_has_no_slash_at_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert open_store("runs/x").url == str(tmp_path / "runs/x")
    assert open_store("s3://bucket/runs/x/").url == "s3://bucket/runs/x"


def test_a_folder_of_files_goes_there_and_back(storage: Storage, tmp_path: Path) -> None:
    """In parts, where a file is large; in the place of what was there."""
    store, source = storage.open(), make_checkpoint(tmp_path / "source", 1, size_bytes=2 * 2**24 + 12_345)
    (source / "logs").mkdir()
    (source / "logs/a.txt").write_text("a")
    store.write("checkpoints/one/old.bin", b"old")
    store.write("checkpoints/one-more/old.bin", b"old")
    store.upload(source, "checkpoints/one", last=MANIFEST)
    assert store.names("checkpoints/one") == sorted(f"checkpoints/one/{name}" for name in tree(source))
    assert tree(store.download("checkpoints/one", tmp_path / "there/back")) == tree(source)
    assert store.read("checkpoints/one-more/old.bin") == b"old"
    with pytest.raises(FileNotFoundError, match=r"checkpoints/two/: there is none"):
        store.download("checkpoints/two", tmp_path / "two")
    (source / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{MANIFEST}: there is none"):
        store.upload(source, "checkpoints/one", last=MANIFEST)
    assert store.exists(f"checkpoints/one/{MANIFEST}"), "nothing was begun"


def test_deleting_takes_what_is_below_and_nothing_beside(storage: Storage) -> None:
    store = storage.open()
    for name in ("a/1", "a/b/2", "a-b/3", "c"):
        store.write(name, b"1")
    for name in ("a", "c", "a", "nothing/there", "a-b/3/x"):
        store.delete(name)
    assert store.names() == ["a-b/3"]


def test_a_manifest_goes_up_last_and_away_first(proxy: FaultProxy, bucket: Storage, tmp_path: Path) -> None:
    store, source = bucket.open(), make_checkpoint(tmp_path / "source", 1)
    (source / "zzz.bin").write_bytes(b"z")

    def order(method: str) -> list[str]:
        return [path.rpartition("/")[2] for sent, path in proxy.requests if sent == method]

    store.upload(source, "checkpoints/one", last=MANIFEST)
    assert order("PUT") == ["model.safetensors", "state.json", "zzz.bin", MANIFEST]
    store.delete("checkpoints/one")
    assert order("DELETE") == [MANIFEST, "model.safetensors", "state.json", "zzz.bin"]


def test_a_manifest_goes_first_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / RUN_KEY))
    store.upload(make_checkpoint(tmp_path / "source", 1), "checkpoints/one", last=MANIFEST)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.delete("checkpoints/one")
    assert store.names() == ["checkpoints/one/model.safetensors", "checkpoints/one/state.json"]


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
    _kill_uploads(storage, tmp_path, num_kills=10)


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

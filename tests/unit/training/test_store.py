"""What a run's storage promises, in a folder and on a real S3 server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from services.fault_proxy import FaultProxy
from unit.training.storage import (
    RUN_KEY,
    Storage,
    make_checkpoint,
    tree,
)

from training.checkpoint import MANIFEST
from training.store import UnsupportedStorage, open_store

pytestmark = pytest.mark.slow


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


def test_a_listing_tells_sizes_and_whether_something_changed(storage: Storage) -> None:
    store = storage.open()
    store.write("a/x", b"123")
    store.write("b", b"")
    before = store.listing()
    assert {name: stored.size_bytes for name, stored in before.items()} == {"a/x": 3, "b": 0}
    assert store.listing("a") == {"a/x": before["a/x"]}
    store.write("a/x", b"124")
    after = store.listing()
    assert after["a/x"].mark != before["a/x"].mark
    assert after["b"] == before["b"]


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

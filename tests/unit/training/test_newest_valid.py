"""Which checkpoint a run goes on from: the furthest that is whole, in a folder and on a real S3 server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from services.fault_proxy import fault_proxy
from unit.training.storage import RUN_KEY, Storage, make_checkpoint, tree

from training.checkpoint import MANIFEST, newest_valid
from training.store import StorageUnavailable

OTHER_RUN = "ba9876543210"


@pytest.fixture
def sources(storage: Storage, tmp_path: Path) -> dict[str, Path]:
    """Three checkpoints, in the storage as well; by step `b`, `c`, `a`."""
    made = {
        name: make_checkpoint(tmp_path / "sources" / name, step) for name, step in {"a": 18, "b": 6, "c": 12}.items()
    }
    for name, folder in made.items():
        storage.open().upload(folder, f"checkpoints/{name}", last=MANIFEST)
    return made


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _foreign(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"run_key": OTHER_RUN}))


def _scrap(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"step": "many"}))


@pytest.mark.parametrize(
    ("spoil", "name", "why"),
    [
        (_cut, "model.safetensors", "a/model.safetensors differs from its sha256"),
        (_flip, "model.safetensors", "a/model.safetensors differs from its sha256"),
        (_flip, "state.json", "a/state.json differs from its sha256"),
        (None, "state.json", "a/state.json is listed in the manifest but missing"),
        (None, MANIFEST, "checkpoint a: it has no manifest.json, so its upload did not end"),
        (_cut, MANIFEST, "checkpoint a: manifest.json is damaged or cut off"),
        (_scrap, MANIFEST, "checkpoint a: manifest.json is damaged or cut off"),
        (_foreign, MANIFEST, f"a is of run {OTHER_RUN}, not of {RUN_KEY}"),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_not_the_run_s_is_skipped(
    storage: Storage,
    sources: dict[str, Path],
    tmp_path: Path,
    spoil: Callable[[Path], None] | None,
    name: str,
    why: str,
) -> None:
    said: list[str] = []
    newest = newest_valid(storage.open(), tmp_path / "into", said.append)
    assert newest is not None
    assert (tree(newest), said) == (tree(sources["a"]), [])
    if spoil is None:
        storage.open().delete(f"checkpoints/a/{name}")
    else:
        spoil(storage.file(f"checkpoints/a/{name}"))
    newest = newest_valid(storage.open(), tmp_path / "again", said.append)
    assert newest is not None
    assert tree(newest) == tree(sources["c"])
    assert len(said) == 1
    assert why in said[0]
    assert not (tmp_path / "again/a").exists()


def test_nothing_to_go_on_from(storage: Storage, tmp_path: Path) -> None:
    store, said = storage.open(), list[str]()
    assert newest_valid(store, tmp_path / "into", said.append) is None
    store.write("checkpoints/a/state.json", b"{}")
    store.write("checkpoints/stray.json", b"{}")
    assert newest_valid(store, tmp_path / "into", said.append) is None
    assert len(said) == 1
    assert "checkpoint a: it has no manifest.json" in said[0]


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_damage_on_the_way_that_stays_skips_a_checkpoint(
    storage: Storage, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(storage.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.damaged.update({"a/model.safetensors": 10**6, "c/manifest.json": 10**6})
        said: list[str] = []
        newest = newest_valid(storage.open(), tmp_path / "into", said.append)
    assert newest is not None
    assert tree(newest) == tree(sources["b"])
    assert [text.split(": ")[0] for text in said] == ["skipping checkpoint c", "skipping a checkpoint"]


@pytest.mark.parametrize("storage", ["folder"], indirect=True)
def test_a_folder_that_cannot_be_read_is_no_run_without_checkpoints(
    storage: Storage, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run would begin anew because the shared folder was away for a moment."""
    import os

    def gone(folder: Path) -> None:
        raise OSError(107, "Transport endpoint is not connected", str(folder))

    monkeypatch.setattr(os, "scandir", gone)
    with pytest.raises(StorageUnavailable, match="Transport endpoint is not connected"):
        newest_valid(storage.open(), tmp_path / "into", pytest.fail)

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch

from training.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    CorruptCheckpoint,
    load_checkpoint,
    newest_first,
    save_checkpoint,
    save_tensors,
    verify_checkpoint,
    write_json,
)

FILES = ("model.safetensors", "random.safetensors", "state.json")
TENSORS = {
    "model": {
        "kernel": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "half": torch.tensor([0.1, -0.2], dtype=torch.bfloat16),
        "count": torch.tensor(7),
    },
    "random": {"torch": torch.get_rng_state()},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint_1"
    save_checkpoint(folder, run_key="a" * 12, step=12, epoch=2, tensors=TENSORS, state={"step": 12, "lr": 0.25})
    return folder


def test_what_is_saved_is_loaded(checkpoint: Path) -> None:
    manifest = verify_checkpoint(checkpoint)
    assert (manifest.run_key, manifest.step, manifest.epoch) == ("a" * 12, 12, 2)
    assert sorted(manifest.sha256) == sorted(FILES)
    tensors, state = load_checkpoint(checkpoint, TENSORS)
    assert state == {"step": 12, "lr": 0.25}
    for group, content in TENSORS.items():
        assert tensors[group].keys() == content.keys()
        for name, value in content.items():
            assert tensors[group][name].dtype == value.dtype
            assert torch.equal(tensors[group][name], value)


def test_what_the_system_refuses_is_told_as_by_the_system(tmp_path: Path) -> None:
    """A full disk is one of these."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_in_every_file(checkpoint: Path, name: str, where: float) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=f"{name} differs"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_missing_is_found(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"{name} differs"):
        verify_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{name} is listed in the manifest but missing"):
        verify_checkpoint(checkpoint)


def test_a_truncated_manifest_is_found(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    for length in (*range(0, len(content), 11), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpoint, match="cut off"):
            verify_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match="cut off"):
        verify_checkpoint(checkpoint)


def test_a_changed_manifest_is_found(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_bytes())
    digest = manifest["sha256"]["state.json"]
    changes = [
        {"sha256": manifest["sha256"] | {"state.json": "0" * 64 if digest[0] != "0" else "1" * 64}},
        {"sha256": manifest["sha256"] | {"scaler.safetensors": digest}},
        {"schema_version": 2},
        {"unknown": 1},
    ]
    for change in changes:
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(CorruptCheckpoint):
            verify_checkpoint(checkpoint)


def test_the_furthest_checkpoint_comes_first(tmp_path: Path) -> None:
    """Whatever its name says. Without a manifest it comes last, but comes."""
    steps = {"3": 12, "1": 18, "2": 6}
    for name, step in steps.items():
        save_checkpoint(
            tmp_path / CHECKPOINTS / name, run_key="a" * 12, step=step, epoch=step // 6, tensors={}, state={}
        )
    (tmp_path / CHECKPOINTS / "3" / MANIFEST).write_text("{")
    (tmp_path / CHECKPOINTS / "4").mkdir()
    (tmp_path / "artifacts").mkdir()
    assert [path.name for path in newest_first(tmp_path)] == ["1", "2", "4", "3"]
    assert list(newest_first(tmp_path / "missing")) == []


def test_json_replaces_the_old_file_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, {"a": bad})
    assert json.loads(path.read_bytes()) == {"a": 1}
    write_json(path, {"a": 2})
    assert json.loads(path.read_bytes()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]

"""What a cell starts from: a file, a finished run, or the champion of a real registry."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decided
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flows.warm_start
import models
from flows.experiment import Experiment
from flows.settings import Settings
from flows.warm_start import NoSuchWeights, _resolver, specs_of
from tracking.authority import open_authority
from tracking.client import connect
from tracking.packaging import DigestMismatch
from tracking.registry import ARCHITECTURE, register
from tracking.runs import DatasetRef, ensure_run
from training.records import RunResult, record_attempt, write_result
from training.spec import ArchitectureSpec, RunSpec
from training.state import BadFreeze, build_model, warm_start_path

SPEC: list[RunSpec] = []


@pytest.fixture(autouse=True)
def spec_of_the_weights(cell_spec: Callable[..., RunSpec]) -> None:
    SPEC[:] = [cell_spec()]


def weights(path: Path, value: float) -> str:
    """Write weights and return the name that a spec gives them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors = {name: torch.full_like(own, value) for name, own in build_model(SPEC[0]).state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_file_is_kept_under_the_hash_of_its_bytes(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    name = weights(tmp_path / "own.safetensors", 1.0)
    assert _resolver(str(tmp_path / "own.safetensors"), settings)(cell_spec()) == name
    kept = warm_start_path(settings.storage, name)
    assert kept.read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    assert [path.name for path in kept.parent.iterdir()] == [f"{name.removeprefix('sha256:')}.safetensors"]


def test_a_finished_run_gives_its_weights(
    settings: Settings, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    other = cell_spec(seed=7)
    name = weights(settings.storage / other.run_key / "artifacts" / "weights.safetensors", 2.0)
    write_result(settings.storage / other.run_key, make_result(other, 0.5, 0.5))
    assert _resolver(other.run_key[:6], settings)(cell_spec()) == name


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ("missing.safetensors", NoSuchWeights),
        ("weights.pth", NoSuchWeights),
        ("a/b", NoSuchWeights),
        ("beef", NoSuchWeights),
    ],
)
def test_what_is_no_weights_is_refused_by_name(settings: Settings, tmp_path: Path, asked: str, error: type) -> None:
    (tmp_path / "weights.pth").write_bytes(b"pickle")
    with pytest.raises(error, match=asked):
        _resolver(str(tmp_path / asked) if "." in asked else asked, settings)


def crown(settings: Settings, spec: RunSpec, value: float, folder: Path) -> str:
    """Register and promote a model that `spec` trained, as train-all does; returns the name of its weights."""
    client = connect(settings.tracking_uri)
    dataset = DatasetRef(spec.dataset.name, spec.dataset.version, "", {"test": 1})
    run_id = ensure_run(
        client, experiment=spec.dataset.name, run_key=spec.run_key, training_id=spec.run_key, name="x", params={},
        tags={}, dataset=dataset, start_time_ms=1,
    )  # fmt: skip
    name = weights(folder / "artifacts" / "weights.safetensors", value)
    (folder / "artifacts" / "spec.json").write_text(spec.model_dump_json())
    version = register(
        client, model_name=spec.dataset.name, run_id=run_id, run_key=spec.run_key, model_folder=folder,
        tags={ARCHITECTURE: spec.architecture.name}, scores={},
    )  # fmt: skip
    decided.crown(client, open_authority(None, settings.home), spec.dataset.name, version, spec.run_key)
    return name


def test_the_champion_is_followed_without_training_for_ever(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    settings.home.mkdir()
    resolve = _resolver("champion", settings)
    cells = [cell_spec(seed=seed) for seed in range(3)]
    assert [resolve(cell) for cell in cells] == [None] * 3, "no champion yet"
    first = crown(settings, cells[0], 1.0, tmp_path / "first")
    assert [resolve(cell) for cell in cells] == [None] * 3, "the champion is one of them: nothing to do"

    grown = [
        cell.model_copy(update={"dataset": cell.dataset.model_copy(update={"version": "f" * 32})}) for cell in cells
    ]
    assert [resolve(cell) for cell in grown] == [first] * 3, "new data starts from the champion"
    other = grown[0].model_copy(update={"architecture": cell_spec("yolox-tiny").architecture})
    assert resolve(other) is None, "the champion is of another architecture"

    # One of them takes the title: asked again, all are what they were.
    second = crown(settings, grown[1].with_warm_start(first), 2.0, tmp_path / "second")
    assert second != first
    assert [resolve(cell) for cell in grown] == [first] * 3


def test_a_champion_whose_files_were_changed_starts_nothing(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    settings.home.mkdir()
    crown(settings, cell_spec(), 1.0, tmp_path / "first")
    (stored,) = (settings.home / "mlartifacts").rglob("weights.safetensors")
    weights(stored, 2.0)
    grown = cell_spec().model_copy(update={"dataset": cell_spec().dataset.model_copy(update={"version": "f" * 32})})
    with pytest.raises(DigestMismatch, match="changed after registration"):
        _resolver("champion", settings)(grown)


def test_a_cell_keeps_what_it_started_from_when_another_architecture_takes_the_title(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    settings.home.mkdir()
    old, nano = cell_spec(seed=1), cell_spec()
    tiny = nano.model_copy(update={"architecture": cell_spec("yolox-tiny").architecture})
    version = {"dataset": old.dataset.model_copy(update={"version": "f" * 32})}
    first = crown(settings, old.model_copy(update=version), 1.0, tmp_path / "first")
    assert [_resolver("champion", settings)(cell) for cell in (nano, tiny)] == [first, None]
    for cell, start in ((nano, first), (tiny, None)):
        begun = cell.with_warm_start(start)
        record_attempt(settings.storage / begun.run_key, begun, data_source="", code_hash="c")
    crown(settings, tiny, 2.0, tmp_path / "second")
    assert [_resolver("champion", settings)(cell) for cell in (nano, tiny)] == [first, None]


def test_weights_of_another_architecture_are_refused_before_anything_starts(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    weights(tmp_path / "nano.safetensors", 1.0)
    other = cell_spec()
    settings_of_tiny = dataclasses.asdict(models.configure("yolox-tiny"))
    tiny = other.model_copy(update={"architecture": ArchitectureSpec(name="yolox-tiny", settings=settings_of_tiny)})
    with pytest.raises(NoSuchWeights, match=r"fits \d% of yolox-tiny"):
        _resolver(str(tmp_path / "nano.safetensors"), settings)(tiny)


def test_each_dataset_may_start_from_something_else(settings: Settings, tmp_path: Path) -> None:
    torch.manual_seed(1)
    experiment = Experiment.model_validate(
        {
            "architectures": ["yolox-nano"],
            "datasets": ["sample-aerial", "sample-surface"],
            "training_by_dataset": {"sample-surface": {"warm_start": str(tmp_path / "missing.safetensors")}},
        }
    )
    (cold,) = specs_of(experiment, "sample-aerial", "0" * 32, settings)
    assert cold.training.warm_start is None
    with pytest.raises(NoSuchWeights, match=r"missing\.safetensors"):
        specs_of(experiment, "sample-surface", "0" * 32, settings)


def test_a_yolox_release_checkpoint_is_taken_under_our_names(settings: Settings, tmp_path: Path) -> None:
    stem = torch.randn(16, 12, 3, 3)
    released = {
        "backbone.backbone.dark2.0.dconv.bn.weight": torch.ones(16),
        "backbone.backbone.stem.conv.conv.weight": stem,
    }
    content = {"model": released, "start_epoch": 300, "best_ap": np.float64(0.25)}
    torch.save(content, tmp_path / "yolox_nano.pth")
    path = flows.warm_start._from_pickle(tmp_path / "yolox_nano.pth", settings)
    kept = load_file(path)
    assert kept.keys() == {"backbone.stages.0.0.0.norm.weight", "backbone.stem.block.conv.weight"}
    assert torch.equal(kept["backbone.stem.block.conv.weight"], stem)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_a_pickled_state_dict_of_ours_is_as_good_as_safetensors(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec], wrapper: str | None
) -> None:
    state = build_model(cell_spec()).state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "own.pth")
    kept = load_file(warm_start_path(settings.storage, _resolver(str(tmp_path / "own.pth"), settings)(cell_spec())))  # type: ignore[arg-type]
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)


def test_a_frozen_part_must_be_among_the_weights(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    state = build_model(cell_spec()).state_dict()
    rest = {name: value.contiguous() for name, value in state.items() if not name.startswith("neck.")}
    save_file(rest, tmp_path / "without_neck.safetensors")
    resolve = _resolver(str(tmp_path / "without_neck.safetensors"), settings)

    def frozen(*parts: str) -> RunSpec:
        spec = cell_spec()
        return spec.model_copy(update={"training": spec.training.model_copy(update={"freeze": parts})})

    assert resolve(frozen("backbone")) is not None
    with pytest.raises(BadFreeze, match=r"has nothing for \d+ of the weights to keep, neck\."):
        resolve(frozen("backbone", "neck"))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x10" + bytes(200)])
def test_a_damaged_file_of_weights_is_refused(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec], content: bytes
) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(NoSuchWeights, match="is no safetensors file, or is damaged"):
        _resolver(str(tmp_path / "x.safetensors"), settings)(cell_spec())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(os.environ["EVIL"]),))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (Evil(), r"x\.pth refers to pathlib\.(_local\.)?Path\.touch\. Nothing in it was run|refers to .*getattr"),
        ({"model": {"a": torch.zeros(1)}}, "fits 0% of yolox-nano"),
        ({"model": {"a": torch.tensor([0.0, torch.nan])}}, "a has values that are not finite"),
        ({"model": {"a": 3}}, "must hold a dictionary of plain tensors"),
        ([1, 2], "must hold a dictionary of plain tensors"),
        ({"model": {"a": torch.eye(2).to_sparse()}}, "must hold a dictionary of plain tensors"),
        (b"PK\x03\x04 half a file", "damaged"),
        (b"<html>not found</html>", "damaged"),
        (b"", "damaged"),
        ({"model": {3: torch.zeros(1)}}, "must hold a dictionary of plain tensors"),
    ],
)
def test_what_is_no_release_checkpoint_is_refused_unexecuted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell_spec: Callable[..., RunSpec],
    content: object, rule: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    if isinstance(content, bytes):
        (tmp_path / "x.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pth")
    with pytest.raises(NoSuchWeights, match=rule):
        _resolver(str(tmp_path / "x.pth"), settings)(cell_spec())
    assert not (tmp_path / "evil").exists()

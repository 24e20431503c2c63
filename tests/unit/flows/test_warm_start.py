"""What a cell starts from: a file, a finished run, or the champion of a real registry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.evaluate import UnknownRun
from flows.settings import Settings
from flows.warm_start import NoSuchWeights, resolver
from tracking.client import connect
from tracking.registry import ARCHITECTURE, promote, register
from tracking.runs import DatasetRef, ensure_run
from training.records import RunResult, write_result
from training.spec import RunSpec
from training.state import warm_start_path


def weights(path: Path, value: float) -> str:
    """Write weights and return the name that a spec gives them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((3,), value)}, path)
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_file_is_kept_under_the_hash_of_its_bytes(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    name = weights(tmp_path / "own.safetensors", 1.0)
    assert resolver(str(tmp_path / "own.safetensors"), settings)(cell_spec()) == name
    kept = warm_start_path(settings.storage, name)
    assert kept.read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    assert [path.name for path in kept.parent.iterdir()] == [f"{name.removeprefix('sha256:')}.safetensors"]


def test_a_finished_run_gives_its_weights(
    settings: Settings, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    other = cell_spec(seed=7)
    name = weights(settings.storage / other.run_key / "artifacts" / "weights.safetensors", 2.0)
    write_result(settings.storage / other.run_key, make_result(other, 0.5, 0.5))
    assert resolver(other.run_key[:6], settings)(cell_spec()) == name


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ("missing.safetensors", NoSuchWeights),
        ("weights.pth", NoSuchWeights),
        ("a/b", NoSuchWeights),
        ("beef", UnknownRun),
    ],
)
def test_what_is_no_weights_is_refused_by_name(settings: Settings, tmp_path: Path, asked: str, error: type) -> None:
    (tmp_path / "weights.pth").write_bytes(b"pickle")
    with pytest.raises(error, match=asked):
        resolver(str(tmp_path / asked) if "." in asked else asked, settings)


def crown(settings: Settings, spec: RunSpec, value: float, folder: Path) -> str:
    """Register and promote a model that `spec` trained, as train-all does; returns the name of its weights."""
    client = connect(settings.tracking_uri)
    dataset = DatasetRef(spec.dataset.name, spec.dataset.version, "", {"test": 1})
    run_id = ensure_run(
        client, experiment=spec.dataset.name, run_key=spec.run_key, training_id=spec.run_key, name="x", params={},
        tags={}, dataset=dataset, start_time_ms=1,
    )  # fmt: skip
    name = weights(folder / "weights.safetensors", value)
    (folder / "spec.json").write_text(spec.model_dump_json())
    for file in ("spec.json", "weights.safetensors"):
        client.log_artifact(run_id, str(folder / file))
    version = register(
        client, model_name=spec.dataset.name, run_id=run_id, run_key=spec.run_key, model_folder=folder,
        tags={ARCHITECTURE: spec.architecture.name}, scores={},
    )  # fmt: skip
    promote(client, spec.dataset.name, version)
    return name


def test_the_champion_is_followed_without_training_for_ever(
    settings: Settings, tmp_path: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    settings.home.mkdir()
    resolve = resolver("champion", settings)
    cell = cell_spec(seed=1)
    assert resolve(cell) is None, "no champion yet"
    first = crown(settings, cell_spec(seed=0), 1.0, tmp_path / "first")
    assert resolve(cell) == first
    assert resolve(cell_spec("yolox-tiny", seed=1)) is None, "the champion is of another architecture"

    # The warm cell is trained and takes the title: asked again, it is what it was.
    warm = cell.with_warm_start(first)
    second = crown(settings, warm, 2.0, tmp_path / "second")
    assert second != first
    assert cell.with_warm_start(resolve(cell)).run_key == warm.run_key
    # New data, though, starts from the new champion.
    grown = cell.model_copy(update={"dataset": cell.dataset.model_copy(update={"version": "f" * 32})})
    assert resolve(grown) == second

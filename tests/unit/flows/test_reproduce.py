"""What `speck reproduce` refuses before it trains, and how it compares. The training itself: tests/integration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models
from flows.commit_code import NoSuchCode, code_of
from flows.reproduce import CannotReproduce, Weights, compare_weights, reproduce_version
from flows.settings import REPO, Settings
from tracking.client import connect
from tracking.registry import Version, history, register
from tracking.runs import DatasetRef, ensure_run
from training.code import training_code_hash
from training.spec import ComputeSpec, RunSpec

MakeSpec = Callable[..., RunSpec]


def present_hash() -> str:
    return training_code_hash(REPO, models.ARCHITECTURES["yolox-nano"].build.__module__)


def registered(client: Any, spec: RunSpec, folder: Path, **tags: str) -> Version:
    """A version whose run has these tags, with weights of one number."""
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "spec.json").write_text(spec.model_dump_json())
    save_file({"one": torch.ones(1)}, folder / "artifacts" / "weights.safetensors")
    name = spec.dataset.name
    run_id = ensure_run(
        client, experiment=name, run_key=spec.run_key, training_id=spec.run_key, name="x", params={}, tags=tags,
        dataset=DatasetRef(name, spec.dataset.version, "", {"test": 1}), start_time_ms=1,
    )  # fmt: skip
    register(client, model_name=name, run_id=run_id, run_key=spec.run_key, model_folder=folder, tags={}, scores={})
    return history(client, name)[0]


@pytest.mark.parametrize("lacking", ["record", "code", "gpus", "data", "warm start"])
def test_what_is_missing_is_said_before_anything_is_trained(
    lacking: str, settings: Settings, tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, tags = tiny_spec(), {"speck.code_hash": present_hash()}
    monkeypatch.setenv("SPECK_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SPECK_DATA_SOURCE", tiny.source)
    if lacking == "record":
        tags, message = {}, "its MLflow run .* is gone"
    elif lacking == "code":
        tags, message = (
            {"speck.code_hash": "beef"},
            "by code beef.*its commit unknown is not in this repository",
        )
    elif lacking == "gpus":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        spec = tiny_spec(compute=ComputeSpec(workers=2, gpus_per_worker=1))
        message = "was trained on GPUs, 2 at least, and this machine has 1"
    elif lacking == "data":
        monkeypatch.setenv("SPECK_DATA_SOURCE", str(tmp_path / "empty"))
        (tmp_path / "empty").mkdir()
        message = f"version {spec.dataset.version} of tiny-squares is not to be had"
    else:
        spec, message = tiny_spec(warm_start=f"sha256:{'a' * 64}"), "began with the weights sha256:a+, and .* is gone"
    client = connect(settings.tracking_uri)
    version = registered(client, spec, tmp_path / "model", **tags)
    with pytest.raises((CannotReproduce, NoSuchCode), match=message):
        reproduce_version(client, spec.dataset.name, version, Settings(), lambda _: None)
    assert not list((settings.home / "reproduced").rglob("*.json"))


def test_a_registry_cannot_name_another_folder_to_be_deleted(
    settings: Settings, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    client, spec = connect(settings.tracking_uri), tiny_spec()
    version = registered(client, spec, tmp_path / "model", **{"speck.code_hash": present_hash()})
    client.set_model_version_tag(spec.dataset.name, "1", "speck.run_key", f"../../../../runs/{spec.run_key}")
    (version,) = history(client, spec.dataset.name)
    with pytest.raises(CannotReproduce, match=r"'\.\./.*', its tag speck\.run_key, is no run key"):
        reproduce_version(client, spec.dataset.name, version, settings, lambda _: None)


@pytest.mark.slow
def test_a_commit_with_other_code_than_was_recorded_is_refused() -> None:
    dirty = "The tree had uncommitted changes then"
    with (
        pytest.raises(NoSuchCode, match=rf"trained by code beef.*its commit HEAD has [0-9a-f]{{12}}\. {dirty}"),
        code_of("beef", "HEAD", is_dirty=True, architecture="yolox-nano"),
    ):
        pass


def test_the_code_that_lies_here_is_used_where_it_is_the_same() -> None:
    with code_of(present_hash(), "unknown", is_dirty=True, architecture="yolox-nano") as code:
        assert code == REPO


def test_weights_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    def saved(name: str, **tensors: torch.Tensor) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    first = saved("first", a=torch.zeros(3), b=torch.ones(2, dtype=torch.int64))
    assert compare_weights(first, first) == Weights(2, 0, 0.0)
    nudged = torch.zeros(3)
    nudged[1] = -0.25
    second = saved("second", a=nudged, b=torch.ones(2, dtype=torch.int64))
    assert compare_weights(first, second) == Weights(2, 1, 0.25)
    third = saved("third", a=torch.zeros(3), c=torch.ones(2, dtype=torch.int64))
    assert compare_weights(first, third) == Weights(3, 2, None)
    assert compare_weights(first, saved("fourth", a=torch.zeros(3), b=torch.ones(2))) == Weights(2, 1, None)

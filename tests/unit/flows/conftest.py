from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import TinyDataset
from finished import finish_run
from recorded import result_of

import tracking.client
from data.versioning import DatasetVersion
from flows.load_gates import load_gates
from flows.promote import Promotion, automatic, promote_run
from flows.settings import Settings
from tracking.client import SQLITE, connect, database
from tracking.promotion import Gates
from training.checkpoint import save_tensors, write_json
from training.records import RunResult, hash_files, write_result
from training.spec import RunSpec, ScoringSpec
from training.state import build_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "tiny-squares"
MakeSpec = Callable[..., RunSpec]
Finish = Callable[..., RunResult]
PromoteRun = Callable[..., Promotion]


@pytest.fixture(scope="session", autouse=True)
def _quick_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow takes two seconds to make an SQLite store: it makes one, and all new ones are copies of that."""
    made, real = tmp_path_factory.mktemp("mlflow") / "mlflow.db", tracking.client._connect

    def connect_to_a_copy(uri: str) -> MlflowClient:
        if uri.startswith(SQLITE) and not (path := database(uri)).stat().st_size:
            if not made.exists():
                real(f"{SQLITE}{made}")
            shutil.copyfile(made, path)
        return real(uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.client, "_connect", connect_to_a_copy)
        yield


@pytest.fixture
def environment() -> Iterator[None]:
    """What a command adds to the environment goes with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: None) -> Settings:
    """Settings whose home is a folder that does not exist yet, as a user would choose it; no server anywhere."""
    monkeypatch.setenv("SPECK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPECK_STORE", str(tmp_path / "store"))
    for name in ("MLFLOW_TRACKING_URI", "SPECK_RAY_JOBS_URL", "SPECK_STORAGE", "RAY_ADDRESS", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    return Settings()


@pytest.fixture
def home(settings: Settings, tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose dataset is known and can be fetched."""
    monkeypatch.setenv("SPECK_DATA_SOURCE", tiny.source)
    monkeypatch.setenv("SPECK_STORE", str(tmp_path / "store"))
    for module in ("data.card", "flows.promote"):
        monkeypatch.setattr(f"{module}.load_card", lambda name: {NAME: tiny.card}[name])
    return Settings()


@pytest.fixture
def gates(tiny: TinyDataset) -> Gates:
    return load_gates(tiny.card)


@pytest.fixture
def finish(home: Settings, tiny: TinyDataset, tiny_spec: MakeSpec) -> Finish:
    def make(
        seed: int, share: float, *, spec: RunSpec | None = None, folder: Path | None = None, **how: Any
    ) -> RunResult:
        return finish_run(spec or tiny_spec(seed=seed), folder or tiny.folder, home, share=share, seed=seed, **how)

    return make


@pytest.fixture
def promote(home: Settings, gates: Gates) -> PromoteRun:
    def call(result: RunResult, asked: Gates = gates, approve: Any = automatic, **how: Any) -> Promotion:
        return promote_run(connect(home.tracking_uri), result, home, asked, approve, lambda _: None, **how)

    return call


@pytest.fixture
def run(
    settings: Settings, tiny: Any, tiny_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> RunSpec:  # fmt: skip
    """A finished run of an untrained model in the settings' home, with its dataset known and prepared."""
    monkeypatch.setenv("SPECK_DATA_SOURCE", tiny.source)
    monkeypatch.setenv("SPECK_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("flows.find_model.load_card", lambda name: {tiny.card.name: tiny.card}[name])
    version = DatasetVersion(tiny.card.name, tiny.version, 1, 1, {}, False)
    monkeypatch.setattr("flows.find_model.current_version", lambda *_: version)
    torch.manual_seed(0)
    spec = tiny_spec(scoring=ScoringSpec(score_threshold=0, max_detections=20))
    folder = settings.storage / spec.run_key
    (folder / "artifacts").mkdir(parents=True)
    save_tensors(folder / "artifacts" / "weights.safetensors", build_model(spec).state_dict())
    write_json(folder / "artifacts" / "spec.json", spec.model_dump(mode="json"))
    write_result(folder, make_result(spec, 0.1, 0.1, files=hash_files(folder, folder / "artifacts")))
    return spec


@pytest.fixture
def weights(run: RunSpec, settings: Settings) -> Path:
    return settings.storage / run.run_key / "artifacts" / "weights.safetensors"


@pytest.fixture
def cell_spec(tiny_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    """Makes the spec of one cell of a matrix."""

    def make(architecture: str = "yolox-nano", dataset: str = "tiny-squares", seed: int = 0) -> RunSpec:
        spec = tiny_spec(seed=seed)
        return spec.model_copy(
            update={
                "architecture": spec.architecture.model_copy(update={"name": architecture}),
                "dataset": spec.dataset.model_copy(update={"name": dataset}),
            }
        )

    return make


@pytest.fixture
def make_result() -> Callable[..., RunResult]:
    """See `recorded.result_of`."""
    return result_of

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from evaluation.result import ScoreResult, score_key
from flows.settings import Settings
from training.records import RunResult
from training.scoring import score_options
from training.spec import RunSpec


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
    for name in ("MLFLOW_TRACKING_URI", "SPECK_RAY_JOBS_URL", "SPECK_STORAGE", "RAY_ADDRESS", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    return Settings()


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
    """Makes what a finished run of `spec` with these AP values would leave behind."""

    def make(spec: RunSpec, val_ap: float | None, test_ap: float | None, **changes: Any) -> RunResult:
        scores = {"val": _score(spec, "val", val_ap), "test": _score(spec, "test", test_ap)}
        values = {
            "files": {},
            "attempts": 1,
            "seconds": {"score_test": 2.0, "job": 60.0},
            "code_hash": "c0de",
            "finished_ms": 1_000,
        }
        return RunResult(run_key=spec.run_key, spec=spec, scores=scores, **(values | changes))

    return make


def _score(spec: RunSpec, split: Literal["val", "test"], ap: float | None) -> ScoreResult:
    options, protocol = score_options(spec), spec.dataset.card.protocol
    return ScoreResult(
        run_key=spec.run_key, score_key=score_key(protocol, options), protocol=protocol, dataset_name=spec.dataset.name,
        dataset_version=spec.dataset.version, split=split, options=options,
        metrics={"coco/AP": ap, "coco/AP50": None if ap is None else ap / 2 + 0.5, "coco/AP_small": None},
        per_class={"bright": {"coco/AP": ap, "coco/AR": 0.75}, "dark": {"coco/AP": None}}, counts={"num_images": 8},
    )  # fmt: skip

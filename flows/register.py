"""A finished run as a version of its dataset's registered model."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flows.describe import describe
from flows.settings import REPO, Settings
from tracking.model_card import as_markdown
from tracking.packaging import Inference, package
from tracking.registry import history, register
from tracking.runs import TRAINING
from training.artifacts import OPERATING_POINT
from training.checkpoint import file_sha256
from training.records import CorruptResult, RunResult, training_id
from training.scoring import postprocess_config, score_options
from training.spec import RunSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient


def register_run(client: MlflowClient, result: RunResult, run_id: str, settings: Settings) -> int:
    """The version of a run, registered now if it was not; of two flows that register it at once both get one version.

    Raises:
        CorruptResult: the weights are not those of the result.
    """
    name = result.spec.dataset.name
    versions = _versions_of(client, name, run_id)
    if not versions:
        _register(client, result, run_id, settings)
        versions = _versions_of(client, name, run_id)
    return min(versions)


def _versions_of(client: MlflowClient, name: str, run_id: str) -> list[int]:
    return [version.version for version in history(client, name) if version.run_id == run_id]


def _register(client: MlflowClient, result: RunResult, run_id: str, settings: Settings) -> None:
    spec, run_folder = result.spec, settings.storage / result.run_key
    artifacts, training = run_folder / "artifacts", training_id(run_folder)
    with tempfile.TemporaryDirectory(prefix="speck-model-") as folder:
        weights = Path(shutil.copy(artifacts / "weights.safetensors", folder))
        if file_sha256(weights) != result.files["artifacts/weights.safetensors"]:
            raise CorruptResult(f"the weights of run {result.run_key} have changed since it was recorded; run again")
        model_folder = package(
            weights,
            spec.model_dump_json(indent=1),
            (artifacts / OPERATING_POINT).read_text(encoding="utf-8"),
            REPO / "models",
            REPO / "evaluation" / "tile_merging.py",
            Path(folder) / "model",
            architecture=spec.architecture.name,
            settings=spec.architecture.settings,
            class_names=spec.dataset.card.classes,
            inference=inference_of(spec),
            card=as_markdown(describe(result, training, settings)),
        )
        scores = {f"test/{name}": value for name, value in result.scores["test"].metrics.items() if value is not None}
        register(
            client,
            model_name=spec.dataset.name,
            run_id=run_id,
            run_key=result.run_key,
            model_folder=model_folder,
            tags={
                "speck.architecture": spec.architecture.name,
                "speck.dataset_version": spec.dataset.version,
                "speck.data_licence": spec.dataset.card.licence,
                "speck.data_sources": "; ".join(spec.dataset.card.sources) or spec.dataset.card.source,
                TRAINING: training,
            },
            scores=scores,
        )


def inference_of(spec: RunSpec) -> Inference:
    """How pictures are looked at when a run with this spec is scored."""
    options = score_options(spec)
    return Inference(
        input_size_px=options.input_size_px,
        precision=options.precision,
        tiling=None if options.tiling is None else options.tiling.model_dump(),
        flip=options.flip,
        postprocess=asdict(postprocess_config(spec)),
    )

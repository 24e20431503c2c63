"""From finished cells to the champion: select on val, decide on test, register, move the alias."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.result import ScoreResult
from flows.cells import CellOutcome
from flows.evaluate import score_run
from flows.settings import REPO, Settings
from tracking.packaging import package
from tracking.promotion import Candidate, Verdict, decide
from tracking.registry import Version, champion, history, promote, record_verdict, register
from training.records import RunResult, read_result

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRIC = "coco/AP"


@dataclass(frozen=True)
class Promotion:
    """What became of a dataset's best cell: its version in the registry, and the verdict over it."""

    dataset: str
    run_key: str
    version: int
    verdict: Verdict


def select(outcomes: Sequence[CellOutcome]) -> CellOutcome:
    """The cell with the highest AP on the validation split; the test split is not looked at."""
    return max(outcomes, key=lambda outcome: outcome.result.scores["val"].metrics[METRIC] or 0.0)


def promote_best(client: MlflowClient, outcomes: Sequence[CellOutcome], settings: Settings) -> Promotion:
    """Register the cell selected on val, and make it champion if it beats the present one on the same test version.

    A champion of another dataset version, or scored under other rules, is scored again on this one first.
    """
    best = select(outcomes)
    result, run_id = best.result, best.run_id
    if run_id is None:
        raise ValueError(f"run {result.run_key} has no MLflow run yet; run again when the tracking store is reachable")
    name = result.spec.dataset.name
    holder = champion(client, name)
    registered = (known.version for known in history(client, name) if known.run_key == result.run_key)
    version = next(registered, None) or _register(client, result, run_id, settings)
    test = result.scores["test"]
    verdict = decide(_candidate(test), _rescored(holder, test, settings) if holder is not None else None)
    if holder is None or holder.run_key != result.run_key:
        record_verdict(client, name, version, promoted=verdict.promote, reason=verdict.reason)
    if verdict.promote:
        promote(client, name, version)
    return Promotion(name, result.run_key, version, verdict)


def _candidate(score: ScoreResult) -> Candidate:
    # The score key stands for the protocol with all its options and the code that computes it.
    return Candidate(
        run_key=score.run_key,
        dataset_version=score.dataset_version,
        protocol=f"{score.protocol} {score.score_key}",
        metric=METRIC,
        score=score.metrics[METRIC],
    )


def _rescored(holder: Version, test: ScoreResult, settings: Settings) -> Candidate:
    result = read_result(settings.storage / holder.run_key)
    if result is None:
        return Candidate(holder.run_key, holder.dataset_version, "unknown", METRIC, holder.scores.get(f"test/{METRIC}"))
    score = result.scores["test"]
    if (score.dataset_version, score.score_key) != (test.dataset_version, test.score_key):
        score = score_run(result, settings, split="test", dataset_version=test.dataset_version)
    return _candidate(score)


def _register(client: MlflowClient, result: RunResult, run_id: str, settings: Settings) -> int:
    spec, artifacts = result.spec, settings.storage / result.run_key / "artifacts"
    with tempfile.TemporaryDirectory(prefix="speck-model-") as folder:
        model_folder = package(
            artifacts / "weights.safetensors",
            spec.model_dump_json(indent=1),
            REPO / "models",
            Path(folder) / "model",
            architecture=spec.architecture.name,
            settings=spec.architecture.settings,
            class_names=spec.dataset.card.classes,
            input_size_px=spec.training.input_size_px,
            postprocess={
                name: getattr(spec.scoring, name)
                for name in ("score_threshold", "nms_iou", "max_detections", "max_candidates")
            },
        )
        scores = {f"test/{name}": value for name, value in result.scores["test"].metrics.items() if value is not None}
        return register(
            client,
            model_name=spec.dataset.name,
            run_id=run_id,
            run_key=result.run_key,
            model_folder=model_folder,
            tags={"speck.architecture": spec.architecture.name, "speck.dataset_version": spec.dataset.version},
            scores=scores,
        )

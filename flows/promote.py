"""From finished cells to the champion: select on val, decide on test, register, move the alias."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.result import ScoreResult, code_hash, score_key
from flows.cells import CellOutcome
from flows.evaluate import score_run
from flows.settings import REPO, Settings
from tracking.packaging import package
from tracking.promotion import Candidate, Verdict, decide
from tracking.registry import CHAMPION, Version, download, history, promote, record_verdict, register
from tracking.runs import TRAINING
from training.artifacts import OPERATING_POINT
from training.checkpoint import file_sha256
from training.records import CorruptResult, RunResult, read_result, training_id
from training.scoring import score_options
from training.spec import RunSpec

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


class NotRecorded(RuntimeError):
    """A cell cannot be promoted because MLflow does not know it yet."""


def ranked(outcomes: Sequence[CellOutcome]) -> list[CellOutcome]:
    """The cells by their AP on the validation split, best first; the test split is not looked at."""
    return sorted(outcomes, key=lambda outcome: -(outcome.result.scores["val"].metrics[METRIC] or 0.0))


def promote_best(client: MlflowClient, outcomes: Sequence[CellOutcome], settings: Settings) -> Promotion:
    """Register the cell selected on val, and make it champion if it beats the present one on the same test version.

    A champion of another dataset version, or scored under other rules, is scored again under these first.

    Raises:
        NotRecorded: the cell has no MLflow run, because the store was lost on the way.
    """
    best = ranked(outcomes)[0]
    result = best.result
    if best.run_id is None:
        raise NotRecorded(f"run {result.run_key} has no MLflow run yet; run again when the tracking store is reachable")
    name, training = result.spec.dataset.name, training_id(settings.storage / result.run_key)
    known = history(client, name)
    holder = next((version for version in known if CHAMPION in version.aliases), None)
    registered = next((version for version in known if version.run_id == best.run_id), None)
    version = registered.version if registered else _register(client, result, best.run_id, training, settings)
    champion = _rescored(client, holder, result, settings) if holder is not None else None
    verdict = decide(_candidate(result.scores["test"], training), champion)
    if registered is None or not registered.verdict or verdict.promote:
        record_verdict(client, name, version, promoted=verdict.promote, reason=verdict.reason)
    if verdict.promote:
        promote(client, name, version)
    return Promotion(name, result.run_key, version, verdict)


def _candidate(score: ScoreResult, training: str) -> Candidate:
    # Input size, thresholds and precision belong to the model; what is counted, and by which code, to the protocol.
    rules = f"max_dets={score.options.max_dets} ignore_rule={score.options.ignore_rule} code={code_hash()[:12]}"
    return Candidate(
        training=training,
        dataset_version=score.dataset_version,
        protocol=f"{score.protocol} {rules}",
        metric=METRIC,
        score=score.metrics[METRIC],
    )


def _rescored(client: MlflowClient, holder: Version, challenger: RunResult, settings: Settings) -> Candidate:
    """The champion as a candidate: its own score where that compares with the challenger's, else a new one."""
    training = holder.tags.get(TRAINING, holder.run_key)
    own = _own_result(settings.storage / holder.run_key, training)
    if own is not None and _comparable(own.scores["test"], challenger.scores["test"]):
        return _candidate(own.scores["test"], training)
    with tempfile.TemporaryDirectory(prefix="speck-champion-") as folder:
        artifacts = settings.storage / holder.run_key / "artifacts"
        if own is None:
            artifacts = download(client, holder, ("spec.json", "weights.safetensors"), Path(folder))
        spec = RunSpec.model_validate_json((artifacts / "spec.json").read_bytes())
        scoring = spec.scoring.model_copy(update={"max_dets": challenger.spec.scoring.max_dets})
        spec = spec.model_copy(update={"dataset": challenger.spec.dataset, "scoring": scoring})
        _, scored = score_run(spec, artifacts / "weights.safetensors", settings, ("test",))
    return _candidate(scored["test"].result, training)


def _comparable(one: ScoreResult, other: ScoreResult) -> bool:
    current = all(score.score_key == score_key(score.protocol, score.options) for score in (one, other))
    one_rules, other_rules = _candidate(one, ""), _candidate(other, "")
    return current and (one_rules.dataset_version, one_rules.protocol) == (
        other_rules.dataset_version,
        other_rules.protocol,
    )


def _own_result(run_folder: Path, training: str) -> RunResult | None:
    """What the champion's own folder says of it, None if that is damaged, or of another training."""
    if training_id(run_folder) != training:
        return None
    try:
        return read_result(run_folder)
    except CorruptResult:
        return None


def _register(client: MlflowClient, result: RunResult, run_id: str, training: str, settings: Settings) -> int:
    spec, artifacts = result.spec, settings.storage / result.run_key / "artifacts"
    with tempfile.TemporaryDirectory(prefix="speck-model-") as folder:
        weights = Path(shutil.copy(artifacts / "weights.safetensors", folder))
        if file_sha256(weights) != result.files["artifacts/weights.safetensors"]:
            raise NotRecorded(f"the weights of run {result.run_key} have changed since it was recorded; run again")
        model_folder = package(
            weights,
            spec.model_dump_json(indent=1),
            (artifacts / OPERATING_POINT).read_text(encoding="utf-8"),
            REPO / "models",
            Path(folder) / "model",
            architecture=spec.architecture.name,
            settings=spec.architecture.settings,
            class_names=spec.dataset.card.classes,
            input_size_px=score_options(spec).input_size_px,
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
            tags={
                "speck.architecture": spec.architecture.name,
                "speck.dataset_version": spec.dataset.version,
                "speck.data_licence": spec.dataset.card.licence,
                "speck.data_sources": "; ".join(spec.dataset.card.sources) or spec.dataset.card.source,
                TRAINING: training,
            },
            scores=scores,
        )

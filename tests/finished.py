"""Finished runs without training: untrained weights, made-up detections and their true score, in MLflow as well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.detector import Detected
from flows.promote import Promotion
from flows.record import Recorder
from flows.settings import Settings
from training.artifacts import OPERATING_POINT
from training.checkpoint import save_tensors, write_json
from training.records import RunResult, hash_files, record_attempt, write_result
from training.scoring import Scored, Split, read_ground_truth, score_detections
from training.spec import RunSpec
from training.state import build_model

COMMIT = {"mlflow.source.git.commit": "f" * 40}
CODE = "c0de" * 16
EPOCH_MS = 1_700_000_000_000


def finish_run(
    spec: RunSpec,
    dataset: Path,
    settings: Settings,
    *,
    share: float,
    seed: int = 0,
    provenance: dict[str, str] = COMMIT,
    test: dict[str, Any] | None = None,
    broken_weight: bool = False,
    record: bool = True,
) -> RunResult:
    """Leave a run behind that finds a share of the objects exactly; `test`: what it was scored on instead."""
    folder = settings.storage / spec.run_key
    artifacts = folder / "artifacts"
    artifacts.mkdir(parents=True)
    torch.manual_seed(seed)
    weights = build_model(spec).state_dict()
    if broken_weight:
        next(tensor for tensor in weights.values() if tensor.is_floating_point())[0] = torch.nan
    save_tensors(artifacts / "weights.safetensors", weights)
    write_json(artifacts / "spec.json", spec.model_dump(mode="json"))
    truths = {"val": read_ground_truth(dataset, "val"), "test": test or read_ground_truth(dataset, "test")}
    scored = {split: _scored(spec, split, truth, share, seed) for split, truth in truths.items()}  # type: ignore[arg-type]
    for split, found in scored.items():
        write_json(artifacts / f"score_{split}.json", found.result.model_dump(mode="json"))
        (artifacts / f"detections_{split}.json").write_text(json.dumps(found.detections))
    write_json(artifacts / OPERATING_POINT, asdict(scored["val"].analysis.operating_point))
    attempt = record_attempt(folder, spec, data_source=settings.data_source, code_hash=CODE, provenance=provenance)
    result = RunResult(
        run_key=spec.run_key, spec=spec, scores={split: found.result for split, found in scored.items()},
        files=hash_files(folder, artifacts), attempts=attempt.number, seconds={"score_test": 1.0, "job": 9.0},
        code_hash=CODE, finished_ms=EPOCH_MS,
    )  # fmt: skip
    write_result(folder, result)
    if record:
        problems: list[str] = []
        recorder = Recorder(settings.tracking_uri, None, problems.append)
        recorder.begin(attempt, folder)
        recorder.finish(folder, result)
        assert problems == []
    return result


def _scored(spec: RunSpec, split: Split, truth: dict[str, Any], share: float, seed: int) -> Scored:
    chosen = np.random.default_rng(seed).uniform(size=len(truth["annotations"])) < share
    found: Sequence[Any] = [
        {"image_id": box["image_id"], "category_id": box["category_id"], "bbox": box["bbox"], "score": 0.9}
        for box, is_found in zip(truth["annotations"], chosen, strict=True)
        if is_found
    ]
    counts = {"num_detected_images": len(truth["images"])}
    return score_detections(spec, truth, split, Detected([*found], counts, []))


def failed(promotion: Promotion) -> dict[str, str]:
    """What a verdict's failed rows say of the candidate, by gate."""
    assert promotion.verdict is not None
    return {row.gate: row.candidate for row in promotion.verdict.rows if not row.passed}

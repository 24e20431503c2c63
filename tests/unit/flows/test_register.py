"""What is registered of a finished run: its weights, its way of looking at pictures, and its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flows.describe import describe
from flows.evaluate import score_run
from flows.find_model import find_model
from flows.register import inference_of, register_run
from flows.settings import Settings
from tracking.client import connect
from tracking.packaging import DIGEST
from tracking.registry import history
from tracking.runs import DatasetRef, ensure_run
from training.artifacts import write_artifacts
from training.records import RunResult, hash_files, record_attempt
from training.spec import RunSpec
from training.state import build_model


@pytest.fixture
def scored(run: RunSpec, settings: Settings, tiny: Any, make_result: Callable[..., RunResult]) -> RunResult:
    """A run with all its artifacts; its detections are those of an untrained model."""
    folder = settings.storage / run.run_key
    _, by_split = score_run(run, folder / "artifacts" / "weights.safetensors", Settings(), ("val", "test"))
    weights = build_model(run).state_dict()
    write_artifacts(run, weights, by_split, {}, tiny.folder, folder / "artifacts", [])
    provenance = {"mlflow.source.git.commit": "c0ffee" + 34 * "0"}
    record_attempt(folder, run, data_source=tiny.source, code_hash="c0de", provenance=provenance)
    scores = {split: one.result for split, one in by_split.items()}
    result = make_result(run, 0.1, 0.1, files=hash_files(folder, folder / "artifacts"))
    return result.model_copy(update={"scores": scores})


@pytest.mark.slow
def test_the_registered_version_says_what_the_model_is_worth(scored: RunResult, settings: Settings) -> None:
    settings = Settings()
    spec, client = scored.spec, connect(settings.tracking_uri)
    run_id = ensure_run(
        client, experiment=spec.dataset.name, run_key=spec.run_key, training_id=spec.run_key, name="x", params={},
        tags={}, dataset=DatasetRef(spec.dataset.name, spec.dataset.version, "", {"test": 1}), start_time_ms=1,
    )  # fmt: skip
    number = register_run(client, scored, run_id, settings)
    (version,) = history(client, spec.dataset.name)
    description = client.get_model_version(spec.dataset.name, str(number)).description
    test = scored.scores["test"]
    point = json.loads((settings.storage / spec.run_key / "artifacts" / "analysis_test.json").read_text())
    overall = point["operating_point"]["overall"]
    for told in (
        "Finds bright, dark.", "Bright and dark squares on noise.", "CC0-1.0", spec.run_key, "c0ffee",
        f"| coco/AP | {test.metrics['coco/AP']:.3f} |", "bootstrap samples of the split's 8 images", "8 test pictures",
        f"precision {overall['precision']:.3f} and recall {overall['recall']:.3f}",
        f"Digest of the model's files: `{version.tags[DIGEST]}`",
        scored.files["artifacts/weights.safetensors"],
    ):  # fmt: skip
        assert told in description
    with find_model(f"models:/{spec.dataset.name}/{number}", settings) as model:
        card = (model.weights.parents[1] / "model_card.md").read_text()
    assert description.startswith(card)
    for name in ("coco/AP", "coco/AR_100"):
        one = describe(scored, spec.run_key, settings).scores[name]
        assert one.value == test.metrics[name]
        assert one.low is not None
        assert one.high is not None
        assert 0 <= one.low <= one.value <= one.high <= 1


def test_a_model_looks_at_pictures_as_it_was_scored(run: RunSpec) -> None:
    inference = inference_of(run)
    assert (inference.input_size_px, inference.precision, inference.tiling, inference.flip) == (64, "fp32", None, False)
    assert inference.postprocess == {
        "score_threshold": 0, "nms_iou": 0.65, "max_detections": 20, "max_candidates": 10_000,
    }  # fmt: skip

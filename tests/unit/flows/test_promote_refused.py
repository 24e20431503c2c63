"""Runs that may not become champion, each with its reason: `test_promote` has the others."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from conftest import TinyDataset
from finished import failed
from promotions import aliases, ledger, load_gates_with

from flows.promote import Promotion
from flows.settings import Settings
from training.checkpoint import save_tensors
from training.records import CorruptResult, RunResult, hash_files, write_result
from training.spec import RunSpec, ScoringSpec
from training.state import build_model

MakeSpec = Callable[..., RunSpec]
Finish = Callable[..., RunResult]
PromoteRun = Callable[..., Promotion]

pytestmark = pytest.mark.slow


def test_weights_that_are_not_numbers_are_refused(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    refused = promote(finish(0, 1.0, broken_weight=True))
    assert refused.outcome == "rejected"
    assert list(failed(refused)) == ["finite"]
    assert aliases(home) == {}, "nobody is measured against a broken model"
    assert ledger(home)[0].action == "rejected"


def test_a_run_scored_on_a_smaller_test_set_is_refused(finish: Finish, promote: PromoteRun, tiny: TinyDataset) -> None:
    truth = json.loads((tiny.folder / "annotations" / "test.json").read_text())
    kept = truth["images"][:6]
    ids = {image["id"] for image in kept}
    fewer = truth | {"images": kept, "annotations": [a for a in truth["annotations"] if a["image_id"] in ids]}
    refused = promote(finish(0, 1.0, test=fewer))
    assert failed(refused)["test pictures"] == "6"
    assert "was recorded as" in failed(refused)["lineage"]


def test_a_run_under_another_protocol_is_refused(finish: Finish, promote: PromoteRun, tiny_spec: MakeSpec) -> None:
    refused = promote(finish(0, 1.0, spec=tiny_spec(scoring=ScoringSpec(max_dets=500))))
    assert failed(refused) == {"protocol": "coco max_dets=500 ignore_rule=covered-half"}


def test_tampered_artifacts_are_refused(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    result = finish(0, 0.5)
    folder = home.storage / result.run_key
    path = folder / "artifacts" / "detections_test.json"
    path.write_text(path.read_text().replace("0.9", "0.8", 1))
    with pytest.raises(CorruptResult, match=r"detections_test\.json is missing or differs from its sha256"):
        promote(result)
    assert ledger(home) == []


def test_a_raised_score_is_refused(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    result = finish(0, 0.5)
    score = result.scores["test"]
    raised = score.model_copy(update={"metrics": score.metrics | {"coco/AP": 0.99}})
    refused = promote(result.model_copy(update={"scores": result.scores | {"test": raised}}))
    (told,) = failed(refused).values()
    for part in (
        "score_test.json tell different",
        "MLflow run has test coco/AP",
        "was recorded as 0.99, and its detec",
    ):
        assert part in told


def test_weights_that_changed_together_with_their_result_are_refused(
    finish: Finish, promote: PromoteRun, home: Settings
) -> None:
    result = finish(0, 1.0)
    folder = home.storage / result.run_key
    torch.manual_seed(9)
    save_tensors(folder / "artifacts" / "weights.safetensors", build_model(result.spec).state_dict())
    forged = result.model_copy(update={"files": hash_files(folder, folder / "artifacts")})
    write_result(folder, forged)
    assert failed(promote(forged)) == {"lineage": "its MLflow run has another weights.safetensors"}


def test_changed_files_in_the_registry_are_refused(finish: Finish, promote: PromoteRun, home: Settings) -> None:
    some, everything = finish(0, 0.3), finish(1, 1.0)
    gates_that_refuse = load_gates_with(floors={"coco/AP": 1.0})
    assert promote(some, gates_that_refuse).outcome == "rejected"
    for path in (home.home / "mlartifacts").rglob("model-*/artifacts/weights.safetensors"):
        path.write_bytes(path.read_bytes() + b"x")
    for is_dry in (True, False):
        assert "changed after registration" in failed(promote(some, dry_run=is_dry))["lineage"]
    assert promote(everything).outcome == "promoted"


def test_a_lineage_without_a_commit_is_refused(finish: Finish, promote: PromoteRun) -> None:
    refused = promote(finish(0, 1.0, provenance={"mlflow.source.git.commit": "unknown"}))
    assert failed(refused) == {"lineage": "the commit is not known: train in a git checkout with a commit"}

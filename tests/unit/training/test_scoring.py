"""Scoring detections by COCO's protocol and the dataset's own, and validation while training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scenes import detection, ground_truth
from torch import nn

import training.scoring
from evaluation.detector import Detected
from evaluation.foreground import ObjectScore
from training.scoring import Scored, score_detections, validate
from training.spec import RunSpec, ScoringSpec
from training.workers import Workers

MakeSpec = Callable[..., RunSpec]
FIRST, SECOND = [10, 10, 20, 20], [100, 100, 20, 20]


def by_protocol(spec: RunSpec, protocol: str) -> RunSpec:
    card = spec.dataset.card.model_copy(update={"protocol": protocol})
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})


def scored(spec: RunSpec, truth: dict[str, Any], found: list[dict[str, Any]]) -> Scored:
    seen = [ObjectScore(annotation["id"], 1.0, 1.0) for annotation in truth["annotations"]]
    return score_detections(spec, truth, "val", Detected(found, {}, seen))


def test_the_limit_of_scoring_is_coco_s_alone(tiny_spec: MakeSpec) -> None:
    spec = by_protocol(tiny_spec(scoring=ScoringSpec(max_dets=1)), "visdrone")
    found = [detection(1, 1, box, 0.9) for box in (FIRST, SECOND)]
    metrics = scored(spec, ground_truth((1, 1, FIRST), (1, 1, SECOND)), found).result.metrics
    assert metrics["visdrone/AP"] == pytest.approx(1)
    assert metrics["coco/AR_1"] == 0.5


@pytest.mark.parametrize(("protocol", "metric"), [("voc", "voc/mAP50"), ("aitod", "aitod/AP")])
def test_a_protocol_without_an_ignore_rule_of_its_own_takes_the_dataset_s(
    tiny_spec: MakeSpec, protocol: str, metric: str
) -> None:
    truth = ground_truth((1, 1, FIRST), (1, 1, SECOND), ignore_regions_xywh=[[90, 90, 50, 50]])
    metrics = scored(by_protocol(tiny_spec(), protocol), truth, [detection(1, 1, FIRST)]).result.metrics
    assert (metrics[metric], metrics["coco/AP"]) == (pytest.approx(1), pytest.approx(1))


def test_what_visdrone_cuts_off_is_the_least_likely(tiny_spec: MakeSpec) -> None:
    false = [detection(1, 1, [500, 500, 20, 20], 0.1 + place / 10_000) for place in range(500)]
    found = scored(by_protocol(tiny_spec(), "visdrone"), ground_truth((1, 1, FIRST)), [*false, detection(1, 1, FIRST)])
    assert found.result.metrics["visdrone/AP"] == pytest.approx(1)
    confidences = [row["score"] for row in found.detections]
    assert confidences == sorted(confidences, reverse=True)


def test_validation_counts_as_scoring_does(
    tiny_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = ground_truth((1, 1, FIRST), (1, 1, SECOND), (1, 1, [200, 200, 20, 20]), num_classes=2)
    truth["images"][0] |= {"file_name": "a.png", "ignore_regions_xywh": [[90, 90, 50, 50]]}
    found = [detection(1, 1, box, score) for box, score in ((FIRST, 0.9), ([200, 200, 20, 20], 0.8))]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(truth))
    monkeypatch.setattr(training.scoring, "detect_split", lambda *_, **__: Detected(found, {}, []))
    alone = Workers(0, 1, torch.device("cpu"))
    for max_dets, recall in ((1, 0.5), (2, 1.0)):
        spec = tiny_spec(scoring=ScoringSpec(max_dets=max_dets))
        metrics = validate(spec, nn.Identity(), tmp_path, alone)
        assert metrics[f"coco/AR_{max_dets}"] == recall
        expected = scored(spec, truth, found).result.metrics
        assert metrics == pytest.approx({name: expected[name] for name in metrics}, abs=1e-9)

"""The form of a stored score: what `score_<split>.json` holds and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data.tiling import TileGrid
from evaluation.coco import score
from evaluation.result import ScoreOptions, ScoreResult, code_hash, score_key, score_result

OPTIONS = ScoreOptions(
    score_threshold=0.01, nms_iou=0.65, max_detections=500, max_candidates=10_000, input_size_px=640, precision="fp32",
    max_dets=500, ignore_rule="covered-half",
)  # fmt: skip


def result(**changes: Any) -> ScoreResult:
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8]}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8], "score": 0.5}]
    made = score_result(
        score(truth, found, max_dets=OPTIONS.max_dets, ignore_rule=OPTIONS.ignore_rule), protocol="coco",
        run_key="0123456789ab", dataset_name="toy", dataset_version="f" * 32, split="val", options=OPTIONS,
        detection_counts={"num_dropped_candidates": 3},
    )  # fmt: skip
    return ScoreResult.model_validate({**made.model_dump(), **changes})


def test_json_round_trip_is_exact() -> None:
    made = result()
    assert ScoreResult.model_validate_json(made.model_dump_json()) == made
    assert ScoreResult.model_validate_json(json.dumps(made.model_dump(mode="json"), allow_nan=False)) == made


def test_fields_and_metric_names() -> None:
    stored = json.loads(result().model_dump_json())
    assert stored.keys() == {
        "schema_version", "run_key", "score_key", "protocol", "dataset_name", "dataset_version", "split", "options",
        "metrics", "per_class", "counts",
    }  # fmt: skip
    assert stored["schema_version"] == 1
    areas = ("small", "medium", "large")
    ap_names = [*("AP", "AP50", "AP75"), *(f"AP_{area}" for area in areas)]
    ar_names = [*("AR_1", "AR_10", "AR_500"), *(f"AR_{area}" for area in areas)]
    assert list(stored["metrics"]) == [f"coco/{name}" for name in ap_names + ar_names]
    assert stored["metrics"]["coco/AP_small"] == pytest.approx(1.0)
    assert stored["metrics"]["coco/AP_large"] is None
    assert stored["per_class"]["bus"] == {"coco/AP": None, "coco/AP50": None, "coco/AR": None, "num_ground_truths": 0.0}
    assert stored["counts"]["num_dropped_candidates"] == 3


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '"0.5"', "true"])
def test_only_finite_numbers_are_read(value: str) -> None:
    text = result().model_copy(update={"metrics": {"coco/AP": 0.25}}).model_dump_json()
    assert '"coco/AP":0.25' in text
    with pytest.raises(ValidationError, match=r"coco/AP"):
        ScoreResult.model_validate_json(text.replace('"coco/AP":0.25', f'"coco/AP":{value}'))


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"coco/AP": float("nan")}},
        {"per_class": {"car": {"coco/AP": float("inf")}}},
        {"metrics": {"AP": 0.5}},
        {"metrics": {"visdrone/AP": 0.5}},
        {"counts": {"num_images": -1}},
        {"run_key": "short"},
        {"split": "holdout"},
        {"schema_version": 2},
        {"surprise": 1},
        {"options": {**OPTIONS.model_dump(), "surprise": 1}},
    ],
)
def test_what_does_not_belong_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        result(**changes)


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        result().protocol = "voc"
    with pytest.raises(ValidationError, match="frozen"):
        OPTIONS.max_dets = 100


def test_score_key_depends_on_protocol_and_every_option() -> None:
    changed = {
        "score_threshold": 0.05, "nms_iou": 0.7, "max_detections": 300, "max_candidates": 5_000, "input_size_px": 320,
        "precision": "bf16", "max_dets": 100, "ignore_rule": "none",
        "tiling": TileGrid(size_px=64, overlap_px=8), "flip": True,
    }  # fmt: skip
    assert changed.keys() == ScoreOptions.model_fields.keys()
    keys = {score_key("coco", OPTIONS.model_copy(update={name: value})) for name, value in changed.items()}
    keys |= {score_key("coco", OPTIONS), score_key("visdrone", OPTIONS)}
    assert len(keys) == len(changed) + 2
    assert result().score_key == score_key("coco", OPTIONS)


def test_code_hash_sees_code_and_nothing_else(tmp_path: Path) -> None:
    def hashed(source: str) -> str:
        path = tmp_path / "module.py"
        path.write_text(source)
        return code_hash([path])

    plain = hashed('def f(x):\n    return x + 1\n\nclass A:\n    name = "a"\n')
    assert (
        hashed(
            '"""Doc."""\ndef f(x):  # why\n    """Doc."""\n    return (x +\n 1)\nclass A:\n    "Doc."\n    name = \'a\''
        )
        == plain
    )
    assert hashed('def f(x):\n    return x + 2\n\nclass A:\n    name = "a"\n') != plain
    assert hashed('def f(x):\n    return x + 1\n\nclass A:\n    name = "b"\n') != plain
    assert hashed('def f():\n    """Only a docstring."""\n') == hashed("def f():\n    pass\n")

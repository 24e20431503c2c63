"""Every record that outlives a process: JSON and back, unknown keys and other versions refused, version 1 readable.

The literals below lie in users' storage. A change that cannot read them costs their runs; it needs a new version.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from data.card import DatasetCard
from evaluation.result import ScoreResult
from training.checkpoint import Manifest
from training.records import Attempt, JournalEntry, RunResult
from training.spec import RunSpec

SHA256 = "0" * 64
CARD: dict[str, Any] = {
    "schema_version": 1, "name": "harbour", "description": "Boats.", "licence": "CC0-1.0", "format": "coco",
    "source": "elsewhere", "classes": ["boat", "buoy"], "protocol": "coco", "ignore_rule": "none",
}  # fmt: skip
SPEC: dict[str, Any] = {
    "schema_version": 1,
    "architecture": {
        "name": "yolox-nano",
        "settings": {
            "depth": 0.33, "width": 0.25, "depthwise": True, "candidate_mode": "center", "center_radius": 1.5,
        },
    },
    "dataset": {"name": "harbour", "version": "0123456789abcdef0123456789abcdef", "card": CARD},
    "training": {
        "epochs": 12, "batch_size": 16, "input_size_px": 320, "optimizer": "sgd", "learning_rate": 0.01,
        "momentum": 0.9, "weight_decay": 0.0005, "warmup_epochs": 1.0, "final_learning_rate_ratio": 0.05,
        "closing_epochs": 2, "ema_decay": 0.9998, "ema_ramp_steps": 2000.0, "precision": "bf16",
        "validate_every_epochs": 1,
        "augment": {
            "mosaic_probability": 1.0, "flip_probability": 0.5, "hue_gain": 5.0, "saturation_gain": 30.0,
            "value_gain": 30.0, "scale_min": 0.5, "scale_max": 1.5, "translate": 0.1,
        },
    },
    "scoring": {
        "score_threshold": 0.01, "nms_iou": 0.65, "max_detections": 500, "max_candidates": 10000, "max_dets": 100,
    },
    "compute": {
        "workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 0.0, "loader_processes": 0, "cache_gib": 1.0,
        "max_failures": 2,
    },
    "seed": 0,
}  # fmt: skip
SCORE: dict[str, Any] = {
    "schema_version": 1, "run_key": "a" * 12, "score_key": "b" * 12, "protocol": "coco", "dataset_name": "harbour",
    "dataset_version": "0123456789abcdef0123456789abcdef", "split": "test",
    "options": SPEC["scoring"] | {"input_size_px": 320, "precision": "bf16", "ignore_rule": "none"},
    "metrics": {"coco/AP": 0.5, "coco/AP_large": None}, "per_class": {"boat": {"AP": 0.5}}, "counts": {"num_images": 8},
}  # fmt: skip
RECORDS: dict[type[BaseModel], dict[str, Any]] = {
    DatasetCard: CARD,
    RunSpec: SPEC,
    ScoreResult: SCORE,
    Manifest: {
        "schema_version": 1, "run_key": "a" * 12, "step": 50, "epoch": 2, "sha256": {"model.safetensors": SHA256},
    },
    JournalEntry: {
        "schema_version": 1, "run_key": "a" * 12, "attempt": 1, "step": 50, "epoch": 2, "timestamp_ms": 1789000000000,
        "seconds": 3.5, "code_hash": "c" * 12, "metrics": {"train/loss": 1.5}, "non_finite": ["val/coco/AP"],
    },
    Attempt: {
        "schema_version": 1, "run_key": "a" * 12, "number": 1, "spec": SPEC, "data_source": "/data",
        "code_hash": "c" * 12, "submitted_ms": 1789000000000, "provenance": {"speck.host": "node"},
    },
    RunResult: {
        "schema_version": 1, "run_key": "a" * 12, "spec": SPEC,
        "scores": {"val": SCORE | {"split": "val"}, "test": SCORE},
        "files": {"artifacts/weights.safetensors": SHA256}, "attempts": 1, "seconds": {"train": 9.5},
        "code_hash": "c" * 12, "finished_ms": 1789000000000,
    },
}  # fmt: skip
every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)


@every_record
def test_version_1_is_read_and_written_as_it_was(record: type[BaseModel]) -> None:
    content = RECORDS[record]
    read = record.model_validate_json(json.dumps(content))
    assert json.loads(read.model_dump_json()) == content
    assert record.model_validate_json(read.model_dump_json()) == read


@every_record
def test_every_key_but_the_optional_ones_is_required_and_none_is_unknown(record: type[BaseModel]) -> None:
    content = RECORDS[record]
    # A field that came later is not written at its default, so that what was stored before keeps its hash.
    assert content.keys() == {name for name, field in record.model_fields.items() if field.exclude_if is None}
    for key, field in record.model_fields.items():
        without = {name: value for name, value in content.items() if name != key}
        if field.is_required():
            with pytest.raises(ValidationError, match=key):
                record.model_validate(without)
    with pytest.raises(ValidationError, match="surprise"):
        record.model_validate_json(json.dumps(content | {"surprise": 1}))


def test_an_attempt_from_before_provenance_was_kept_is_read() -> None:
    content = {name: value for name, value in RECORDS[Attempt].items() if name != "provenance"}
    assert Attempt.model_validate_json(json.dumps(content)).provenance == {}


@every_record
@pytest.mark.parametrize("version", [0, 2, "1.0"])
def test_another_schema_version_is_refused(record: type[BaseModel], version: Any) -> None:
    with pytest.raises(ValidationError, match="schema_version"):
        record.model_validate_json(json.dumps(RECORDS[record] | {"schema_version": version}))


@every_record
def test_records_do_not_change(record: type[BaseModel]) -> None:
    read = record.model_validate_json(json.dumps(RECORDS[record]))
    with pytest.raises(ValidationError, match="frozen"):
        read.schema_version = 1  # type: ignore[attr-defined]


def test_the_run_key_is_a_hash_of_what_decides_the_result() -> None:
    """Canonical JSON: sorted keys, no spaces, without `scoring`, `compute` and what a card tells people alone.

    Users' folders are named by it.
    """
    identity = {key: copy.deepcopy(value) for key, value in SPEC.items() if key not in {"scoring", "compute"}}
    for told in ("description", "licence", "source"):
        del identity["dataset"]["card"][told]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    key = RunSpec.model_validate(SPEC).run_key
    assert key == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert key == "93942b977754"

"""What scoring finds out about a split, and what a run keeps of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.protocols import PROTOCOLS, ProtocolName
from training.artifacts import read_operating_point, write_artifacts
from training.scoring import Scored, Split, score_split, validate
from training.spec import RunSpec, ScoringSpec
from training.state import build_model
from training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
EVERYTHING = ScoringSpec(score_threshold=0, max_detections=20)
MakeSpec = Callable[..., RunSpec]


def both(spec: RunSpec, tiny: Any) -> dict[Split, Scored]:
    torch.manual_seed(0)
    model = build_model(spec)
    val = score_split(spec, model, tiny.folder, "val", ALONE)
    assert val is not None
    chosen = val.analysis.operating_point
    test = score_split(spec, model, tiny.folder, "test", ALONE, operating_point=chosen)
    assert test is not None
    return {"val": val, "test": test}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_dataset_is_scored_by_its_own_protocol_beside_coco(
    tiny: Any, tiny_spec: MakeSpec, protocol: ProtocolName
) -> None:
    spec = tiny_spec(scoring=EVERYTHING)
    card = spec.dataset.card.model_copy(update={"protocol": protocol})
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})
    result = both(spec, tiny)["test"].result
    assert result.protocol == protocol
    assert {name.partition("/")[0] for name in result.metrics} == {"coco", protocol, "analysis"}
    assert all(f"{protocol}/" in " ".join(values) for values in result.per_class.values())
    assert result.counts["num_images"] == 8
    assert protocol == "coco" or result.counts[f"{protocol}/num_images"] == 8


def test_test_is_judged_at_the_thresholds_of_val(tiny: Any, tiny_spec: MakeSpec) -> None:
    scored = both(tiny_spec(scoring=EVERYTHING), tiny)
    val, test = (scored[split].analysis for split in ("val", "test"))
    assert val.operating_point.overall is not None
    assert test.operating_point.overall is not None
    assert test.operating_point.overall.score == val.operating_point.overall.score
    assert (val.chosen_on, test.chosen_on) == ("val", "val")
    assert scored["test"].result.metrics["analysis/threshold"] == val.operating_point.overall.score
    objects = [a for a in scored["test"].ground_truth["annotations"] if not a["iscrowd"]]
    seen = scored["test"].foreground
    assert sum(group.num_objects for group in seen.overall.values()) + seen.num_not_scored == len(objects)


def test_validation_gives_the_numbers_of_the_score(tiny: Any, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(scoring=EVERYTHING)
    torch.manual_seed(0)
    quick = validate(spec, build_model(spec), tiny.folder, ALONE)
    whole = both(spec, tiny)["val"].result.metrics
    assert quick == pytest.approx({name: value for name, value in whole.items() if name.startswith("coco/")}, abs=1e-9)
    assert len(quick) == 12


def test_a_run_keeps_its_thresholds_analyses_and_report(tiny: Any, tiny_spec: MakeSpec, tmp_path: Path) -> None:
    spec = tiny_spec(scoring=EVERYTHING)
    scored = both(spec, tiny)
    folder = tmp_path / "artifacts"
    write_artifacts(spec, build_model(spec).state_dict(), scored, {"train": 1.0}, tiny.folder, folder, [])
    folder = tmp_path / "artifacts"
    assert read_operating_point(folder) == scored["val"].analysis.operating_point
    assert read_operating_point(tmp_path) is None
    for split, content in scored.items():
        assert json.loads((folder / f"analysis_{split}.json").read_text()) == json.loads(
            json.dumps(asdict(content.analysis))
        )
        assert json.loads((folder / f"foreground_{split}.json").read_text())["points"].keys() == {"missed", "found"}
        assert (folder / f"foreground_{split}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert f"run {spec.run_key}" in page
    assert page.count("data:image/png") == 2
    assert "<script" not in page
    assert not (tmp_path / "artifacts.partial").exists()

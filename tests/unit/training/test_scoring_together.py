"""Scoring by one, two and three processes over gloo: the same detections to the last bit, each image once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch

import training.scoring
from data.tiling import TileGrid
from training.errors import MiscountedImages
from training.scoring import detect_split, require_each_once, split_inputs
from training.spec import RunSpec, ScoringSpec
from training.state import build_model
from training.workers import Workers

SCRIPT = Path(__file__).with_name("scoring_worker.py")
ROOT = Path(__file__).parents[3]
ALONE = Workers(0, 1, torch.device("cpu"))
MakeSpec = Callable[..., RunSpec]
# Batches of 8: three, the last of them of 3 pictures.
NUM_IMAGES = 19
NAMES = ("whole", "bf16", "mirrored", "tiles", "one batch")


@pytest.fixture(scope="module")
def found(tiny: Any, tiny_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of processes what rank 0 got of each spec."""
    folder = tmp_path_factory.mktemp("gloo")
    conftest.write_squares(folder / "dataset", {"test": NUM_IMAGES})
    rules: dict[str, Any] = {"score_threshold": 0, "max_detections": 20}
    whole = tiny_spec(scoring=ScoringSpec(**rules))
    tiles = ScoringSpec(**rules, tiling=TileGrid(size_px=40, overlap_px=12))
    specs = {
        "whole": (whole, folder / "dataset"),
        "bf16": (tiny_spec(precision="bf16", scoring=ScoringSpec(**rules)), folder / "dataset"),
        "mirrored": (tiny_spec(scoring=ScoringSpec(**rules, flip=True)), folder / "dataset"),
        "tiles": (tiny_spec(scoring=tiles), folder / "dataset"),
        "one batch": (whole, tiny.folder),
    }
    job = {name: (spec.model_dump(mode="json"), str(dataset)) for name, (spec, dataset) in specs.items()}
    (folder / "job.json").write_text(json.dumps(job))
    script = load_script()
    # This process is rank 0: importing everything once more is what takes the time.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    others = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)], env=environment) for rank in (1, 2)
    ]
    try:
        scored = {1: script.score_all(folder, ALONE)}
        scored |= {world_size: script.score_together(0, world_size, folder) for world_size in (2, 3)}
        assert [other.wait(timeout=300) for other in others] == [0, 0]
    finally:
        for other in others:
            other.kill()
            other.wait()
    return scored


def load_script() -> Any:
    specification = importlib.util.spec_from_file_location("scoring_worker", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_score_does_not_depend_on_the_number_of_workers(
    found: dict[int, dict[str, Any]], name: str, world_size: int
) -> None:
    assert found[world_size][name] == found[1][name]


def test_every_image_and_tile_was_looked_at(found: dict[int, dict[str, Any]]) -> None:
    detections, counts, *_ = found[1]["whole"]
    assert counts["num_detected_images"] == NUM_IMAGES
    assert {row["image_id"] for row in detections} == set(range(1, NUM_IMAGES + 1))
    counts = found[1]["tiles"][1]
    assert (counts["num_detected_images"], counts["num_tiles"]) == (NUM_IMAGES, 4 * NUM_IMAGES)
    assert len({json.dumps(found[1][name][0]) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (
            None,
            "each image of the split .* exactly once. not at all: 1 (id 40); more than once: 1 (id 34)",
        ),
        (
            TileGrid(size_px=64, overlap_px=0),
            "each tile of the split .* not at all: 1 (id 7); more than once: 1 (id 1)",
        ),
    ],
)
def test_who_is_missing_and_who_came_twice_is_named(
    tiny: Any, tiny_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tiling: TileGrid | None, message: str
) -> None:
    """The number of images is right: only their ids tell."""
    spec = tiny_spec(scoring=ScoringSpec(tiling=tiling))
    monkeypatch.setattr(training.scoring, "scoring_batches", lambda *_, **__: [[0, 1, 2, 3], [4, 5, 6, 1]])
    with pytest.raises(MiscountedImages, match=message.replace("(", r"\(").replace(")", r"\)")):
        detect_split(spec, build_model(spec), split_inputs(spec, tiny.folder, "test"), ALONE)


def test_the_first_of_many_missing_are_named() -> None:
    with pytest.raises(MiscountedImages, match=r"not at all: 30 \(id 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...\)\. Score"):
        require_each_once("image", range(30), [])
    require_each_once("image", [4, 2], [2, 4])

"""Scoring by tiles, from the spec to the score's record."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from data.tiling import TileGrid, Tiling
from evaluation.result import score_key
from training.scoring import Scored, score_options, score_split
from training.spec import RunSpec, ScoringSpec
from training.state import build_model
from training.workers import Workers

MakeSpec = Callable[..., RunSpec]


def scored(spec: RunSpec, tiny: object) -> Scored:
    torch.manual_seed(0)
    workers = Workers(0, 1, torch.device("cpu"))
    result = score_split(spec, build_model(spec), tiny.folder, "val", workers)  # type: ignore[attr-defined]
    assert result is not None
    return result


def scoring(size_px: int, overlap_px: int) -> ScoringSpec:
    return ScoringSpec(score_threshold=0, max_detections=20, tiling=TileGrid(size_px=size_px, overlap_px=overlap_px))


def test_tiles_larger_than_the_pictures_change_nothing_but_the_key(tiny: object, tiny_spec: MakeSpec) -> None:
    plain = scored(tiny_spec(scoring=ScoringSpec(score_threshold=0, max_detections=20)), tiny)
    tiled = scored(tiny_spec(scoring=scoring(4096, 0)), tiny)
    assert [
        (row["image_id"], row["category_id"], pytest.approx(row["bbox"]), row["score"]) for row in plain.detections
    ] == [(row["image_id"], row["category_id"], row["bbox"], row["score"]) for row in tiled.detections]
    assert len(plain.detections) > 50
    assert plain.result.metrics == tiled.result.metrics
    assert plain.result.score_key != tiled.result.score_key
    assert tiled.result.run_key == plain.result.run_key


def test_pictures_are_scored_by_tiles_and_each_counts_once(tiny: object, tiny_spec: MakeSpec) -> None:
    counts = scored(tiny_spec(scoring=scoring(32, 8)), tiny).result.counts
    assert (counts["num_detected_images"], counts["num_tiles"]) == (8, 8 * 9)
    assert counts["num_merged_detections"] > 0


def test_without_tiling_the_score_key_is_what_it_was(tiny_spec: MakeSpec) -> None:
    options = score_options(tiny_spec())
    assert "tiling" not in options.model_dump(mode="json")
    assert "tiling" not in json.loads(tiny_spec().model_dump_json())["scoring"]
    with_tiles = score_options(tiny_spec(scoring=scoring(32, 8)))
    assert score_key("coco", with_tiles) != score_key("coco", options)
    assert type(options).model_validate_json(with_tiles.model_dump_json()) == with_tiles


def test_a_dataset_of_tiles_is_scored_by_its_tiles_unless_told_otherwise(tiny_spec: MakeSpec) -> None:
    spec = tiny_spec()
    card = spec.dataset.card.model_copy(update={"tiling": Tiling(size_px=48, overlap_px=8)})
    cut = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})
    assert score_options(cut).tiling == TileGrid(size_px=48, overlap_px=8)
    assert cut.run_key != spec.run_key
    whole = cut.model_copy(update={"scoring": scoring(4096, 0)})
    assert score_options(whole).tiling == TileGrid(size_px=4096, overlap_px=0)
    assert RunSpec.model_validate_json(whole.model_dump_json()) == whole


def test_input_size_and_flip_are_part_of_the_score_key_and_left_out_otherwise(tiny_spec: MakeSpec) -> None:
    plain = score_options(tiny_spec())
    assert not {"flip", "input_size_px"} & json.loads(tiny_spec().model_dump_json())["scoring"].keys()
    assert "flip" not in plain.model_dump(mode="json")
    changed = tiny_spec(scoring=ScoringSpec(flip=True, input_size_px=96))
    options = score_options(changed)
    assert (options.flip, options.input_size_px, plain.input_size_px) == (True, 96, 64)
    assert changed.run_key == tiny_spec().run_key
    keys = {
        score_key("coco", plain.model_copy(update=change)) for change in ({}, {"flip": True}, {"input_size_px": 96})
    }
    assert len(keys) == 3
    assert RunSpec.model_validate_json(changed.model_dump_json()) == changed
    assert type(options).model_validate_json(options.model_dump_json()) == options
    assert score_options(tiny_spec(scoring=ScoringSpec(input_size_px=64))) == plain

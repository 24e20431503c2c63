"""Two processes over gloo against one: the same global batch is the same step, the same images the same score."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from families import SMALLEST

from data.augment import AugmentConfig
from training.spec import RunSpec, ScoringSpec
from training.workers import Workers

SCRIPT = Path(__file__).with_name("gloo_worker.py")
ROOT = Path(__file__).parents[3]
CLASSES = ("bright", "dark")


class Seen(NamedTuple):
    """What one process saw, and what each of two did."""

    alone: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tiny: Any, tiny_spec: Callable[..., RunSpec], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("gloo")
    write_same_pixels(folder / "same_pixels")
    unaugmented = AugmentConfig(mosaic_probability=0, flip_probability=0, hue_gain=0, saturation_gain=0, value_gain=0)
    scoring = ScoringSpec(score_threshold=0, max_detections=20)
    specs = {
        "first_step": tiny_spec(
            epochs=1, closing_epochs=0, warmup_epochs=0, learning_rate=1.0, weight_decay=0, augment=unaugmented
        ),
        "scored": tiny_spec(scoring=scoring),
        "trained": tiny_spec(epochs=1, closing_epochs=0),
    }
    job = {
        "specs": {name: spec.model_dump(mode="json") for name, spec in specs.items()},
        "datasets": {"same_pixels": str(folder / "same_pixels"), "tiny": str(tiny.folder)},
        "families": SMALLEST,
    }
    (folder / "job.json").write_text(json.dumps(job))
    worker = load_script()
    # This process is rank 0: importing everything once more is what takes the time.
    other = subprocess.Popen(
        [sys.executable, str(SCRIPT), "1", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        alone = worker.run_all(folder, Workers(0, 1, torch.device("cpu")))
        together = worker.join_and_run(0, folder)
        assert other.wait(timeout=300) == 0
    finally:
        other.kill()
        other.wait()
    return Seen(alone, [together, torch.load(folder / "rank_1.pt")])


def load_script() -> Any:
    specification = importlib.util.spec_from_file_location("gloo_worker", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_same_pixels(folder: Path) -> None:
    """Four pictures of the same pixels with 1, 1, 3 and 6 boxes; validation and test have one of them."""
    rng = np.random.default_rng(5)
    picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, counts in {"train": (1, 1, 3, 6), "val": (1,), "test": (1,)}.items():
        images, annotations = [], []
        for index, count in enumerate(counts):
            name = f"{split}-{index}.png"
            cv2.imwrite(str(folder / "images" / name), picture)
            images.append({"id": index + 1, "file_name": name, "width": 64, "height": 64, "ignore_regions_xywh": []})
            for _ in range(count):
                x, y, width, height = (*rng.integers(0, 40, 2).tolist(), *rng.integers(8, 24, 2).tolist())
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": index + 1, "category_id": int(rng.integers(1, 3)),
                     "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
                )  # fmt: skip
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(document))


def test_the_first_step_has_the_same_loss(seen: Seen) -> None:
    """All pictures have the same pixels, so that batch normalisation sees the same statistics in every share; they
    differ in their number of boxes, so that a mean of the ranks' means would be another number."""
    alone, together = seen.alone["first_step"]["metrics"], seen.ranks[0]["first_step"]["metrics"]
    names = [name for name in alone if name.startswith("train/loss")]
    assert len(names) >= 4
    for name in names:
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name


def test_the_first_step_moves_the_last_layers_alike(seen: Seen) -> None:
    """The gradients of layers behind the last batch normalisation are sums over pictures: any split adds up to them.

    Those before it are not, for each rank normalises over its own share.
    """
    before, alone = (seen.alone["first_step"][when] for when in ("initial", "weights"))
    together = seen.ranks[0]["first_step"]["weights"]
    last = [name for name in alone if "predictors" in name]
    assert len(last) >= 6
    moved = {name: float((alone[name] - before[name]).norm()) for name in last}
    # The coarsest level has no positives here, so that only its objectness learns.
    assert sum(distance > 0 for distance in moved.values()) >= 2 * len(last) // 3
    for name in last:
        assert float((together[name] - alone[name]).norm()) <= 0.01 * moved[name], name


def test_scoring_sees_every_image_once(seen: Seen) -> None:
    alone, together = seen.alone["scored"], seen.ranks[0]["scored"]
    assert seen.ranks[1]["scored"] is None
    assert together["counts"] == alone["counts"]
    assert together["counts"]["num_detected_images"] == 8
    assert len(alone["detections"]) == 8 * 20
    assert set(Counter(d["image_id"] for d in alone["detections"])) == set(range(33, 41))
    assert len(together["detections"]) == len(alone["detections"])
    for one, two in zip(alone["detections"], together["detections"], strict=True):
        assert (one["image_id"], one["category_id"]) == (two["image_id"], two["category_id"])
        assert two["score"] == pytest.approx(one["score"], rel=1e-4)
        assert two["bbox"] == pytest.approx(one["bbox"], abs=1e-3)


@pytest.mark.parametrize("what", ["weights", "average"])
def test_ranks_agree_on_every_tensor_after_training(seen: Seen, what: str) -> None:
    """Running statistics too: a rank with its own would score its images with another model than the one stored."""
    one, two = (rank["trained"][what] for rank in seen.ranks)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(seen: Seen) -> None:
    one, two = (rank["trained"] for rank in seen.ranks)
    assert one["metrics"]["train/non_finite_steps"] == two["metrics"]["train/non_finite_steps"] == 1
    assert one["steps"] == two["steps"] == 6
    for name, value in one["weights"].items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("name", SMALLEST)
def test_a_rank_without_objects_takes_the_same_step_as_the_other(seen: Seen, name: str) -> None:
    one, two = (rank["empty"][name] for rank in seen.ranks)
    assert one == two
    assert all(finite for finite, _, _ in one.values())
    assert sum(size > 0 for _, _, size in one.values()) > 0.9 * len(one)

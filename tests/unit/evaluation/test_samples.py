"""Samples by every protocol against that protocol's score of a dataset in which images are really repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenes import random_set

from evaluation.bootstrap import draw
from evaluation.protocols import PROTOCOLS, ProtocolName, score_by
from evaluation.samples import samples_by
from evaluation.tables import tabulate

SAMPLES = 4


def repeated(truth: dict[str, Any], found: list[dict[str, Any]], times: Any) -> tuple[dict[str, Any], list[Any]]:
    """The set with image i `times[i]` times, copies one after the other, under ids of their own."""
    images, annotations, detections = [], [], []
    for image, count in zip(truth["images"], times.astype(int).tolist(), strict=True):
        for _ in range(count):
            new = {"image_id": len(images) + 1}
            images.append({**image, "id": new["image_id"]})
            annotations += [a | new | {"id": 0} for a in truth["annotations"] if a["image_id"] == image["id"]]
            detections += [d | new for d in found if d["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, detections


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_sample_is_the_score_of_repeated_images(protocol: ProtocolName, seed: int) -> None:
    truth, found = random_set(seed)
    truth["images"][1]["ignore_regions_xywh"] = [[0, 0, 500, 600]]
    rng = np.random.default_rng(seed)
    # Without ties: where scores are equal, the copies of two detections have no order of their own.
    found = [row | {"score": (row["score"] + rng.uniform()) / 2} for row in found]
    found.sort(key=lambda row: (row["image_id"], -row["score"]))
    weights = draw(np.arange(len(truth["images"])), SAMPLES, seed)
    sampled = samples_by(protocol, tabulate(truth, found), weights, max_dets=7, ignore_rule="covered-half")
    for column, times in enumerate(weights.T):
        tables = tabulate(*repeated(truth, found, times))
        expected = score_by("coco", tables, max_dets=7, ignore_rule="covered-half")
        own = score_by(protocol, tables, max_dets=7 if protocol == "coco" else None, ignore_rule="covered-half")
        metrics = expected.metrics | own.metrics
        assert any(name.startswith(f"{protocol}/") for name in sampled.metrics)
        for name, values in sampled.metrics.items():
            assert values[column] == pytest.approx(known(metrics[name]), abs=1e-9, nan_ok=True), name
        for label, rows in sampled.per_class.items():
            of_class = expected.per_class[label] | own.per_class[label]
            for name, values in rows.items():
                assert values[column] == pytest.approx(known(of_class[name]), abs=1e-9, nan_ok=True), (label, name)


def known(value: float | None) -> float:
    return float("nan") if value is None else value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_split_without_a_picture_has_no_score(protocol: ProtocolName) -> None:
    nothing = tabulate({"images": [], "annotations": [], "categories": [{"id": 1, "name": "car"}]}, [])
    assert set(score_by(protocol, nothing, ignore_rule="covered-half").metrics.values()) == {None}

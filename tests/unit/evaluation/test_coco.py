"""The COCO score against pycocotools' own calls, a published result and cases with a closed form."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import detection, ground_truth, random_set

from evaluation.checks import BadDetections, BadGroundTruth
from evaluation.coco import score

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
# In the order of pycocotools' `stats`.
STATS = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]


def plain_pycocotools(truth: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = truth
        index.createIndex()
        evaluator = COCOeval(index, index.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_pycocotools(seed: int) -> None:
    truth, found = random_set(seed)
    scored = score(truth, found, ignore_rule="none")
    expected = plain_pycocotools(json.loads(json.dumps(truth)), json.loads(json.dumps(found)))
    assert [scored.metrics[f"coco/{name}"] for name in STATS] == [None if v == -1 else v for v in expected]
    assert list(scored.metrics) == [f"coco/{name}" for name in STATS]
    assert scored.counts["num_truncated_detections"] > 0
    assert scored.counts["num_crowds"] > 0


def test_published_numbers_of_the_coco_api() -> None:
    folder = SHARED / "coco_eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the COCO API's evaluation fixture is not part of the project")
    truth = json.loads((folder / "dataset/cocoapi/instances_val2014_100.json").read_text())
    found = json.loads((folder / "cocoapi_results/instances_val2014_fakebbox100_results.json").read_text())
    published = (folder / "cocoapi_results/val2014_fake_eval_res.txt").read_text().split("type=bbox")[1]
    lines = [line for line in published.split("type=keypoints")[0].splitlines() if " = 0" in line]
    scored = score(truth, found, ignore_rule="none")
    assert len(lines) == 12
    assert [f"{scored.metrics[f'coco/{name}']:.3f}" for name in STATS] == [line.rpartition(" = ")[2] for line in lines]


def test_inputs_stay_as_they_were_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    truth, found = random_set(0)
    before = json.dumps([truth, found])
    score(truth, found, ignore_rule="covered-half")
    assert json.dumps([truth, found]) == before
    assert capfd.readouterr() == ("", "")


def test_ap_is_read_at_the_maxdets_asked_for() -> None:
    boxes = [[float(x), float(y), 8.0, 8.0] for x in range(0, 300, 20) for y in range(0, 200, 20)]
    truth = ground_truth(*((1, 1, box) for box in boxes))
    found = [detection(1, 1, box) for box in boxes]
    assert len(boxes) == 150
    dense = score(truth, found, max_dets=500, ignore_rule="none")
    assert dense.metrics["coco/AP"] == dense.metrics["coco/AP_small"] == dense.metrics["coco/AR_500"] == 1.0
    assert dense.metrics["coco/AR_10"] == pytest.approx(10 / 150)
    # Two thirds of the objects at precision 1 cover recall 0.00 ... 0.66: 67 of the 101 points.
    cut = score(truth, found, max_dets=100, ignore_rule="none")
    assert cut.metrics["coco/AP"] == pytest.approx(67 / 101)
    assert cut.counts["num_truncated_detections"] == 50
    few = score(truth, found, max_dets=5, ignore_rule="none").metrics
    assert few["coco/AR_5"] == pytest.approx(5 / 150)
    assert "coco/AR_10" not in few


def test_no_detections_is_zero_and_no_ground_truth_is_none() -> None:
    truth = ground_truth((1, 1, [10, 10, 20, 20]), num_images=3, num_classes=2)
    nothing_found = score(truth, [], ignore_rule="none")
    assert nothing_found.metrics["coco/AP"] == nothing_found.metrics["coco/AR_100"] == 0.0
    assert nothing_found.metrics["coco/AP_large"] is None
    assert nothing_found.per_class["class-1"] == {
        "coco/AP": 0.0,
        "coco/AP50": 0.0,
        "coco/AR": 0.0,
        "num_ground_truths": 1.0,
    }
    assert nothing_found.per_class["class-2"] == {
        "coco/AP": None,
        "coco/AP50": None,
        "coco/AR": None,
        "num_ground_truths": 0.0,
    }
    assert list(nothing_found.precision_at_50) == ["class-1"]

    nothing_there = score(ground_truth(num_images=3), [detection(2, 1, [1, 1, 5, 5])], ignore_rule="none")
    assert set(nothing_there.metrics.values()) == {None}
    assert nothing_there.counts["num_detections"] == 1
    assert score(ground_truth(), [], ignore_rule="none").metrics["coco/AP"] is None


def test_false_positives_on_images_without_objects_count() -> None:
    truth = ground_truth((1, 1, [10, 10, 20, 20]), num_images=2)
    found = [detection(2, 1, [10, 10, 20, 20], 0.9), detection(1, 1, [10, 10, 20, 20], 0.8)]
    scored = score(truth, found, ignore_rule="none")
    assert scored.metrics["coco/AP"] == pytest.approx(0.5)
    np.testing.assert_allclose(scored.precision_at_50["class-1"], 0.5)


def test_annotation_ids_do_not_matter() -> None:
    truth = ground_truth((1, 1, [10, 10, 20, 20]), (1, 1, [50, 50, 20, 20]))
    found = [detection(1, 1, [10, 10, 20, 20]), detection(1, 1, [50, 50, 20, 20])]
    for annotation in truth["annotations"]:
        annotation["id"] = 0
    assert score(truth, found, ignore_rule="none").metrics["coco/AP"] == 1.0


def test_all_problems_are_listed_with_their_rows() -> None:
    truth = ground_truth((1, 1, [10, 10, 20, 20]), num_images=2, num_classes=2)
    found = [
        detection(1, 1, [10, 10, 20, 20]),
        detection(7, 1, [10, 10, 20, 20]),
        detection(1, 0, [10, 10, 20, 20]),
        detection(1, 1, [10, float("nan"), 20, 20]),
        detection(1, 1, [10, 10, 0, 20]),
        detection(1, 1, [10, 10, 20, -1]),
        detection(1, 1, [10, 10, 20, 20], 1.5),
        detection(1, 1, [10, 10, 20, 20], float("nan")),
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]},
    ]
    with pytest.raises(BadDetections) as caught:
        score(truth, found, ignore_rule="none")
    message = str(caught.value)
    assert message.startswith("9 problem(s)")
    assert "detection 0:" not in message
    for part in ("1: image_id 7", "2: category_id 0", "3: bbox", "4: bbox", "5: bbox", "6: score 1.5", "7: score nan",
                 "8: bbox [1, 2, 3]", "8: score None"):  # fmt: skip
        assert f"detection {part}" in message


def test_a_long_list_of_problems_is_cut_but_counted() -> None:
    with pytest.raises(BadDetections, match=r"^25 problem\(s\)(?s:.*)\.\.\. and 5 more$"):
        score(ground_truth(), [detection(9, 1, [0, 0, 1, 1])] * 25, ignore_rule="none")


def test_bad_ground_truth_is_refused() -> None:
    truth = ground_truth((1, 1, [10, 10, 20, 20]), (4, 1, [10, 10, 20, 0]))
    truth["images"].append({"id": 1})
    truth["categories"].append({"id": 2, "name": "class-1"})
    with pytest.raises(BadGroundTruth) as caught:
        score(truth, [], ignore_rule="none")
    for part in ("images[1]: id 1 was used by images[0]", "categories[1]: name 'class-1' was used by categories[0]",
                 "annotation 1: image_id 4", "annotation 1: bbox"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="max_dets is 0"):
        score(ground_truth(), [], max_dets=0, ignore_rule="none")

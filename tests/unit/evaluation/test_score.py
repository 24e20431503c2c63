"""How the numbers of several protocols come to stand beside each other."""

from __future__ import annotations

import numpy as np

from evaluation.score import Score, joined, with_counts_named

CURVE = np.linspace(1, 0, 101)
COCO = Score(
    {"coco/AP": 0.5, "coco/AP_small": None},
    {"car": {"coco/AP": 0.5, "num_ground_truths": 7.0}, "bus": {"coco/AP": None}},
    {"num_images": 3, "num_detections": 40},
    {"car": CURVE},
)
OTHER = Score(
    {"voc/mAP50": 0.75, "coco/AP": 0.25, "coco/AP_small": 0.125},
    {"car": {"voc/AP50": 0.75, "num_ground_truths": 9.0}, "van": {"voc/AP50": 1.0}},
    {"num_detections": 50, "num_hits": 4},
    {"car": CURVE / 2},
)


def test_of_two_numbers_of_one_name_the_earlier_stays_even_where_it_is_none() -> None:
    metrics, per_class, counts, precision_at_50 = joined(COCO, OTHER)
    assert metrics == {"coco/AP": 0.5, "coco/AP_small": None, "voc/mAP50": 0.75}
    assert per_class == {
        "car": {"coco/AP": 0.5, "num_ground_truths": 7.0, "voc/AP50": 0.75},
        "bus": {"coco/AP": None},
    }
    assert counts == {"num_images": 3, "num_detections": 40, "num_hits": 4}
    assert precision_at_50 == {"car": CURVE}
    third = Score({"coco/AP": 0.0, "voc/mAP50": 0.0}, {}, {"num_hits": 0})
    assert joined(COCO, OTHER, third) == joined(COCO, OTHER)
    assert COCO.per_class["car"].keys() == {"coco/AP", "num_ground_truths"}


def test_counts_take_the_protocol_s_name_and_metrics_keep_theirs() -> None:
    named = with_counts_named(OTHER, "voc")
    assert named.metrics == OTHER.metrics
    assert named.counts == {"voc/num_detections": 50, "voc/num_hits": 4}
    assert named.per_class == {
        "car": {"voc/AP50": 0.75, "voc/num_ground_truths": 9.0},
        "van": {"voc/AP50": 1.0},
    }
    assert named.precision_at_50 is OTHER.precision_at_50
    assert joined(COCO, named).counts == COCO.counts | named.counts

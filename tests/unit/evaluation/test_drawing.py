from __future__ import annotations

import numpy as np

from evaluation.drawing import draw_detections

NAMES = {1: "Fußgänger", 2: "車"}


def test_lines_lie_around_the_box_and_what_was_detected_stays_visible() -> None:
    picture = np.full((200, 300, 3), 90, np.uint8)
    drawn = draw_detections(picture, [{"category_id": 1, "bbox": [100, 80, 40, 30], "score": 0.5}], NAMES)
    changed = (drawn != picture).any(axis=2)
    assert not changed[81:109, 101:139].any()
    assert changed[79, 100:140].all()
    assert changed[80:110, 99].all()
    assert changed[50:79, 99:].any(), "class and score"
    assert (picture == 90).all(), "the picture that was given"


def test_text_stays_inside_the_picture() -> None:
    picture = np.zeros((60, 60, 3), np.uint8)
    box = {"category_id": 2, "bbox": [45, 0, 15, 12], "score": 1.0}
    drawn = draw_detections(picture, [box], NAMES)
    assert (drawn[15:] != 0).any(), "below the box where there is no room above"


def test_the_best_detection_is_on_top() -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    boxes = [{"category_id": place, "bbox": [40, 60, 20, 20], "score": score} for place, score in ((1, 0.9), (2, 0.3))]
    only = draw_detections(picture, boxes[:1], NAMES)
    both = draw_detections(picture, boxes, NAMES)
    np.testing.assert_array_equal(both[80, 40:60], only[80, 40:60])

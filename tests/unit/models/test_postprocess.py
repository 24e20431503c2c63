from __future__ import annotations

import numpy as np
import pytest
import torch

from models import postprocess
from models.interface import PostprocessConfig
from models.postprocess import select_detections, suppress_non_maxima, torchvision_nms


def nms_by_loop(boxes: torch.Tensor, scores: torch.Tensor, max_iou: float) -> torch.Tensor:
    """What torchvision's function promises, of one class: the indices of the survivors by descending score."""
    order = scores.argsort(descending=True)
    kept = greedy_by_loop(boxes[order].numpy(), np.zeros(len(boxes)), max_iou)
    return order[kept]


@pytest.fixture(autouse=True, params=[None, nms_by_loop], ids=["ours", "as torchvision"])
def suppression(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds whoever suppresses within a class."""
    monkeypatch.setattr(postprocess, "torchvision_nms", lambda _: request.param)


@pytest.mark.skipif(torchvision_nms("cpu") is None, reason="torchvision, which is no requirement, is not installed")
def test_torchvision_keeps_its_promise() -> None:
    boxes, scores, _ = scene(1500, 1, 0)
    nms = torchvision_nms("cpu")
    assert nms is not None
    assert torch.equal(nms(boxes, scores, 0.5), nms_by_loop(boxes, scores, 0.5))


def scene(count: int, num_classes: int, seed: int, extent_px: float = 120.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(count, 2, generator=generator) * extent_px
    boxes = torch.cat((top_left, top_left + torch.rand(count, 2, generator=generator) * 30 + 2), dim=1)
    scores = torch.rand(count, generator=generator)
    return boxes, scores, torch.randint(0, num_classes, (count,), generator=generator)


def greedy_by_loop(boxes: np.ndarray, labels: np.ndarray, max_iou: float) -> list[int]:
    """Class-wise greedy suppression, one box at a time in float32; boxes in score order."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    for i in range(len(boxes)):
        rivals = np.array([j for j in kept if labels[j] == labels[i]], dtype=int)
        width = (np.minimum(boxes[rivals, 2], boxes[i, 2]) - np.maximum(boxes[rivals, 0], boxes[i, 0])).clip(0)
        height = (np.minimum(boxes[rivals, 3], boxes[i, 3]) - np.maximum(boxes[rivals, 1], boxes[i, 1])).clip(0)
        overlap = width * height
        if not (overlap / (areas[rivals] + areas[i] - overlap) > max_iou).any():
            kept.append(i)
    return kept


@pytest.mark.parametrize(("count", "num_classes"), [(0, 3), (1, 1), (255, 1), (257, 2), (1500, 1), (1500, 10)])
@pytest.mark.parametrize("max_iou", [0.3, 0.65])
def test_suppression_equals_a_loop(count: int, num_classes: int, max_iou: float) -> None:
    boxes, scores, labels = scene(count, num_classes, seed=count + num_classes)
    order = scores.argsort(descending=True)
    boxes, labels = boxes[order], labels[order]
    expected = greedy_by_loop(boxes.numpy(), labels.numpy(), max_iou)
    assert suppress_non_maxima(boxes, labels, max_iou, max_kept=count).tolist() == expected
    assert count < 1000 or len(expected) < count


def test_a_chain_in_which_each_box_beats_the_next() -> None:
    """Box i overlaps much only i-1 and i+1, so every second box stays: the hardest case for a parallel solution."""
    x = torch.arange(600, dtype=torch.float32) * 4
    boxes = torch.stack((x, torch.zeros(600), x + 10, torch.full((600,), 10.0)), dim=1)
    kept = suppress_non_maxima(boxes, torch.zeros(600, dtype=torch.int64), 0.4, max_kept=600)
    assert kept.tolist() == list(range(0, 600, 2))


def test_classes_do_not_suppress_each_other_far_from_the_origin() -> None:
    box = torch.tensor([[4000.3, 3000.1, 4004.7, 3004.9]])
    labels = torch.tensor([0, 79, 79, 0])
    assert suppress_non_maxima(box.repeat(4, 1), labels, 0.5, max_kept=4).tolist() == [0, 1]


def test_an_overlap_equal_to_the_limit_stays() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    assert suppress_non_maxima(boxes, labels, 0.5, max_kept=2).tolist() == [0, 1]
    assert suppress_non_maxima(boxes, labels, 0.49, max_kept=2).tolist() == [0]


def test_detections_are_the_best_of_the_loop_in_score_order() -> None:
    boxes, scores, labels = scene(900, 3, seed=7)
    config = PostprocessConfig(score_threshold=0.2, nms_iou=0.5, max_detections=100)
    detections = select_detections(boxes, scores, labels, config)
    order = np.argsort(-scores.numpy(), kind="stable")
    order = order[scores.numpy()[order] >= 0.2]
    expected = order[greedy_by_loop(boxes.numpy()[order], labels.numpy()[order], 0.5)[:100]]
    assert torch.equal(detections.boxes_xyxy_px, boxes[expected])
    assert torch.equal(detections.scores, scores[expected])
    assert torch.equal(detections.labels, labels[expected])
    assert len(expected) == 100
    assert detections.num_dropped_candidates == 0


def test_the_candidate_cap_keeps_the_best_and_counts_the_rest() -> None:
    boxes, scores, labels = scene(50, 2, seed=3, extent_px=5000)
    config = PostprocessConfig(score_threshold=0.5, max_candidates=10)
    detections = select_detections(boxes, scores, labels, config)
    above = int((scores >= 0.5).sum())
    assert detections.num_dropped_candidates == above - 10
    assert detections.scores.min() >= scores.sort(descending=True).values[9]


def test_candidates_of_equal_score_keep_their_order() -> None:
    boxes, _, labels = scene(300, 2, seed=4, extent_px=50_000)
    scores = torch.tensor([0.25, 0.75]).repeat(150)
    detections = select_detections(boxes, scores, labels, PostprocessConfig())
    assert torch.equal(detections.boxes_xyxy_px, torch.cat((boxes[1::2], boxes[::2])))


def test_nothing_above_the_threshold_gives_empty_tensors_of_the_right_type() -> None:
    detections = select_detections(*scene(20, 2, seed=0), PostprocessConfig(score_threshold=2.0))
    assert detections.boxes_xyxy_px.shape == (0, 4)
    assert (detections.scores.dtype, detections.labels.dtype) == (torch.float32, torch.int64)
    assert len(detections.scores) == len(detections.labels) == 0

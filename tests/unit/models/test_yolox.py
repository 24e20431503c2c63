from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.heads import AnchorPredictions
from models.interface import PostprocessConfig

# Recomputed totals of the published sizes with 80 classes; nano is published as 0.91 M.
TOTALS = {
    "yolox-tiny": 5_055_855,
    "yolox-s": 8_968_255,
    "yolox-m": 25_326_495,
    "yolox-l": 54_208_895,
    "yolox-x": 99_071_455,
}
MULTIPLIERS = {
    "yolox-nano": (0.33, 0.25),
    "yolox-tiny": (0.33, 0.375),
    "yolox-s": (0.33, 0.5),
    "yolox-m": (0.67, 0.75),
    "yolox-l": (1.0, 1.0),
    "yolox-x": (1.33, 1.25),
}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counted_by_hand(depth: float, width: float, num_classes: int, *, depthwise: bool) -> int:
    """Parameters of YOLOX from its description alone: weights of convolutions, two per normalised channel."""

    def conv(cin: int, cout: int, k: int) -> int:
        return cin * cout * k * k + 2 * cout

    def conv3(cin: int, cout: int) -> int:
        return 9 * cin + 2 * cin + conv(cin, cout, 1) if depthwise else conv(cin, cout, 3)

    def csp(cin: int, cout: int, n: int) -> int:
        h = cout // 2
        return 2 * conv(cin, h, 1) + n * (conv(h, h, 1) + conv3(h, h)) + conv(2 * h, cout, 1)

    b, n, d = int(64 * width), max(round(3 * depth), 1), int(256 * width)
    backbone = conv(12, b, 3)
    backbone += conv3(b, 2 * b) + csp(2 * b, 2 * b, n)
    backbone += conv3(2 * b, 4 * b) + csp(4 * b, 4 * b, 3 * n)
    backbone += conv3(4 * b, 8 * b) + csp(8 * b, 8 * b, 3 * n)
    backbone += conv3(8 * b, 16 * b) + conv(16 * b, 8 * b, 1) + conv(32 * b, 16 * b, 1) + csp(16 * b, 16 * b, n)
    neck = conv(16 * b, 8 * b, 1) + csp(16 * b, 8 * b, n) + conv(8 * b, 4 * b, 1) + csp(8 * b, 4 * b, n)
    neck += conv3(4 * b, 4 * b) + csp(8 * b, 8 * b, n) + conv3(8 * b, 8 * b) + csp(16 * b, 16 * b, n)
    predictors = d * (num_classes + 5) + num_classes + 5
    head = sum(conv(c * b, d, 1) + 4 * conv3(d, d) + predictors for c in (4, 8, 16))
    return backbone + neck + head


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_parameter_totals_are_exact(name: str) -> None:
    with torch.device("meta"):
        built = num_parameters(models.build(name, num_classes=80))
    depth, width = MULTIPLIERS[name]
    assert built == counted_by_hand(depth, width, 80, depthwise=name == "yolox-nano")
    assert built == TOTALS.get(name, built)
    if name == "yolox-nano":
        assert round(built / 1e6, 2) == 0.91


@pytest.mark.parametrize(("name", "size_px", "gflops"), [("yolox-tiny", 416, 6.41), ("yolox-s", 640, 26.69)])
def test_floating_point_operations_match_the_recomputed_ones(name: str, size_px: int, gflops: float) -> None:
    with torch.device("meta"):
        detector = models.build(name, num_classes=80).eval()
        with FlopCounterMode(display=False) as counter:
            detector(torch.empty(1, 3, size_px, size_px))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize(
    ("name", "num_classes", "total", "gflops"),
    [
        ("yolox-s-p2", 10, 9_685_116, 59.93),
        ("yolox-m-p2", 10, 27_072_156, 150.7),
        ("yolox-l-p2", 10, 57_532_604, 296.8),
        ("yolox-x-p2", 10, 104_599_260, 509.02),
        ("yolox-x-p2", 3, 104_590_272, None),
        ("yolox-x-p2", 80, 104_689_140, None),
    ],
)
def test_four_levels_have_the_known_totals(name: str, num_classes: int, total: int, gflops: float | None) -> None:
    with torch.device("meta"):
        detector = models.build(name, num_classes=num_classes).eval()
        assert num_parameters(detector) == total
        if gflops is not None:
            with FlopCounterMode(display=False) as counter:
                predictions = detector(torch.empty(1, 3, 640, 640))
            assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.001)
            assert predictions.objectness_logits.shape == (1, 160**2 + 80**2 + 40**2 + 20**2)


def test_strides_add_one_level_to_neck_and_head() -> None:
    with torch.device("meta"):
        four = models.build("yolox-tiny", num_classes=3, strides=[4, 8, 16, 32])
        dense = models.build("yolox-nano", num_classes=3, strides=[4, 8, 16, 32], depthwise=False)
        predictions = four.eval()(torch.empty(2, 3, 64, 32))
    assert four.strides == (4, 8, 16, 32)
    assert predictions.objectness_logits.shape == (2, 16 * 8 + 8 * 4 + 4 * 2 + 2 * 1)
    assert num_parameters(dense) == num_parameters(models.build("yolox-n-p2", num_classes=3))


def test_initial_foreground_and_class_probability_is_one_percent() -> None:
    head = models.build("yolox-nano", num_classes=3).head
    for conv in (*head.class_predictors, *head.objectness_predictors):
        assert conv.bias.detach().sigmoid().tolist() == pytest.approx([0.01] * conv.out_channels)
    assert all(conv.bias.detach().abs().max() < 1 for conv in head.box_predictors)


@pytest.mark.parametrize("size_hw", [(32, 48), (40, 64)])
def test_a_size_off_the_largest_stride_names_size_rule_and_remedy(size_hw: tuple[int, int]) -> None:
    detector = models.build("yolox-nano", num_classes=1)
    height, width = size_hw
    message = rf"image size {height} x {width} \(H x W\) must be a multiple of 32, .* to (32|64) x 64\."
    with pytest.raises(ValueError, match=message):
        detector(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 64, 64, 3), (1, 1, 64, 64)])
def test_images_of_another_layout_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        models.build("yolox-nano", num_classes=1)(torch.zeros(shape))


def test_anchor_points_carry_the_values_of_their_cell() -> None:
    """A head whose box predictor is zero but for its bias decodes to one box of known place per cell."""
    detector = models.build("yolox-nano", num_classes=2).eval()
    for conv in detector.head.box_predictors:
        nn.init.zeros_(conv.weight)
        conv.bias.data = torch.tensor([0.5, 0.5, math.log(2.0), 0.0])
    predictions = detector(torch.zeros(1, 3, 64, 32))
    boxes = predictions.decoded_boxes_xyxy_px()[0]
    expected = [
        [(x + 0.5) * s - s, y * s, (x + 0.5) * s + s, (y + 1) * s]
        for s in (8, 16, 32)
        for y in range(64 // s)
        for x in range(32 // s)
    ]
    torch.testing.assert_close(boxes, torch.tensor(expected, dtype=torch.float32))


def test_levels_are_flattened_row_by_row() -> None:
    """The logit of an anchor point comes from its own cell: row-major, level after level."""
    head = models.build("yolox-nano", num_classes=2).head.eval()
    features = [torch.randn(2, 64 * 2**i, 4 // 2**i * 2, 4 // 2**i) for i in range(3)]
    predictions = head(features)
    start = 0
    for i, tower in enumerate(head.towers(features)):
        logits = head.class_predictors[i](tower.classification)
        height, width = logits.shape[2:]
        for row in range(height):
            for column in range(width):
                got = predictions.class_logits[:, start + row * width + column]
                torch.testing.assert_close(got, logits[:, :, row, column])
        start += height * width
    assert start == predictions.class_logits.shape[1]


def test_box_and_objectness_read_the_regression_tower_and_class_the_other() -> None:
    head = models.build("yolox-nano", num_classes=2).head.eval()
    features = [torch.randn(1, channels, 2, 2) for channels in (64, 128, 256)]
    before = head(features)
    for tower in head.class_towers:
        nn.init.zeros_(tower[-1][-1].conv.weight)
    after = head(features)
    assert torch.equal(after.boxes_raw, before.boxes_raw)
    assert torch.equal(after.objectness_logits, before.objectness_logits)
    assert (after.class_logits != before.class_logits).all()


def test_a_score_is_objectness_times_the_likeliest_class() -> None:
    detector = models.build("yolox-nano", num_classes=3)
    grid_xy, strides = torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.tensor([8.0, 8.0])
    predictions = AnchorPredictions(
        torch.zeros(1, 2, 4),
        torch.tensor([[0.0, 2.0]]),
        torch.tensor([[[1.0, 3.0, 2.0], [-1.0, -2.0, -3.0]]]),
        grid_xy,
        strides,
    )
    (detections,) = detector.postprocess(predictions, PostprocessConfig())

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert detections.labels.tolist() == [1, 0]
    assert detections.scores.tolist() == pytest.approx([sigmoid(0) * sigmoid(3), sigmoid(2) * sigmoid(-1)])
    assert detections.boxes_xyxy_px[0].tolist() == [-4.0, -4.0, 4.0, 4.0]

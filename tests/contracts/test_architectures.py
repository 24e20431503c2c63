"""What every architecture of the table promises to the training loop and to scoring.

The behaviour is checked on the small sizes of each family; construction and counts on the whole table.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families import SMALLEST, tensors
from torch import nn

import models
from models.interface import Detections, Losses, PostprocessConfig, Targets

NUM_CLASSES = 3
PACKAGE = Path(models.__file__).parent


def images(num_images: int, height: int = 64, width: int = 64) -> torch.Tensor:
    shape = (num_images, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def targets(per_image: list[int], height: int = 64, width: int = 64) -> Targets:
    generator = torch.Generator().manual_seed(1)
    total = sum(per_image)
    center = torch.rand(total, 2, generator=generator) * torch.tensor([width, height])
    # As large as the cells of each level in turn, so that no level is left without work.
    cells_px = torch.tensor([4.0, 8.0, 16.0, 32.0]).repeat(total)[:total].unsqueeze(1)
    half = cells_px * (torch.rand(total, 2, generator=generator) * 0.4 + 0.8) / 2
    return Targets(
        torch.cat((center - half, center + half), dim=1),
        torch.randint(0, NUM_CLASSES, (total,), generator=generator),
        torch.arange(len(per_image)).repeat_interleave(torch.tensor(per_image)),
        torch.tensor([[0.0, 0.0, 16.0, 16.0]]),
        torch.zeros(1, dtype=torch.int64),
    )


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, num_classes=NUM_CLASSES, **SMALLEST[name])


def total(losses: Losses) -> torch.Tensor:
    return torch.stack([value / losses.counts[name].clamp(min=1) for name, value in losses.sums.items()]).sum()


@pytest.fixture(scope="module", params=SMALLEST)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(name: str) -> nn.Module:
    """A detector after a few steps, in evaluation mode: its norms and scores are no longer those of the start."""
    detector = built(name).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):
        total(detector.criterion(detector(images(2)), targets([6, 6]))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return detector.eval()


def check_losses(losses: Losses, closing: bool) -> None:
    assert losses.sums.keys() == losses.counts.keys()
    assert closing or "l1" not in losses.sums
    for value in (*losses.sums.values(), *losses.counts.values(), *losses.metrics.values()):
        assert (value.shape, value.dtype) == ((), torch.float32)
        assert value.isfinite()
    assert all(value.requires_grad for value in losses.sums.values())
    assert not any(value.requires_grad for value in (*losses.counts.values(), *losses.metrics.values()))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_row_builds_under_its_own_name_from_plain_settings(architecture: str) -> None:
    row = models.ARCHITECTURES[architecture]
    assert row.name == architecture
    assert models.configure(architecture, **vars(row.config)) == row.config
    with torch.device("meta"):
        detector = models.build(architecture, num_classes=NUM_CLASSES)
        size = 2 * max(detector.strides)
        predictions = detector.eval()(torch.empty(1, 3, size, size))
    assert detector.num_classes == NUM_CLASSES
    assert {value.dtype for value in tensors(predictions).values()} == {torch.float32}


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (96, 32)])
def test_losses_are_finite_scalars_at_any_size(name: str, height: int, width: int, closing: bool) -> None:
    detector = built(name).train()
    losses = detector.criterion(detector(images(2, height, width)), targets([5, 3], height, width), closing=closing)
    check_losses(losses, closing)
    assert all(count > 0 for count in losses.counts.values())


def test_every_parameter_learns_within_three_steps(name: str) -> None:
    detector = built(name).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    silent = {parameter for parameter, _ in detector.named_parameters()}
    for _ in range(3):
        total(detector.criterion(detector(images(2)), targets([6, 6]), closing=True)).backward()
        silent -= {key for key, parameter in detector.named_parameters() if parameter.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert silent == set()


def test_without_ground_truth_every_parameter_still_gets_a_finite_gradient(name: str) -> None:
    detector = built(name).train()
    losses = detector.criterion(detector(images(2)), targets([0, 0]), closing=True)
    check_losses(losses, closing=True)
    # Only what judges anchors, not objects, may have something to count.
    assert not any(count for term, count in losses.counts.items() if term != "refined")
    total(losses).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in detector.parameters())


def test_nine_hundred_objects_in_one_image(name: str) -> None:
    detector = built(name).train()
    losses = detector.criterion(detector(images(2, 128, 128)), targets([900, 0], 128, 128))
    check_losses(losses, closing=False)
    total(losses).backward()


def test_loss_sums_of_a_batch_are_the_sums_over_its_images(trained: nn.Module) -> None:
    """What lets the loop spread a global batch over ranks and micro-batches."""
    predictions, both = trained(images(2)), targets([6, 4])
    together = trained.criterion(predictions, both, closing=True)
    apart = []
    for index in range(2):
        mine, regions = both.image_index == index, both.ignore_image_index == index
        alone = Targets(
            both.boxes_xyxy_px[mine],
            both.labels[mine],
            both.image_index[mine] - index,
            both.ignore_xyxy_px[regions],
            both.ignore_image_index[regions] - index,
        )
        apart.append(trained.criterion(trained(images(2)[index : index + 1]), alone, closing=True))
    for key, value in together.sums.items():
        torch.testing.assert_close(value, apart[0].sums[key] + apart[1].sums[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.counts[key], apart[0].counts[key] + apart[1].counts[key])


def test_an_image_is_detected_alike_alone_and_in_a_batch(trained: nn.Module) -> None:
    with torch.no_grad():
        together, alone = tensors(trained(images(3))), tensors(trained(images(3)[1:2]))
    for key, value in alone.items():
        counterpart = together[key][1:2] if len(together[key]) == 3 else together[key]
        torch.testing.assert_close(value, counterpart, rtol=1e-4, atol=1e-4)


def test_state_dict_round_trip_gives_the_same_predictions(name: str, trained: nn.Module) -> None:
    other = built(name).eval()
    other.load_state_dict(trained.state_dict())
    with torch.no_grad():
        expected, got = tensors(trained(images(2))), tensors(other(images(2)))
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_bfloat16_autocast_and_channels_last_give_nearly_the_same_float32_predictions(
    name: str, trained: nn.Module
) -> None:
    with torch.no_grad():
        expected = tensors(trained(images(2)))
        other = built(name).eval()
        other.load_state_dict(trained.state_dict())
        other.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            got = tensors(other(images(2).contiguous(memory_format=torch.channels_last)))
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        assert (got[key] - value).abs().mean() <= 0.05 * max(value.std().item(), 0.1), key


def test_a_bfloat16_step_is_finite(name: str) -> None:
    detector = built(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.criterion(detector(images(2)), targets([6, 6]), closing=True)
    check_losses(losses, closing=True)
    total(losses).backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())


def test_detections_keep_the_contract(trained: nn.Module) -> None:
    config = PostprocessConfig(score_threshold=1e-6, max_detections=20, max_candidates=30)
    num_anchors = sum((64 // stride) ** 2 for stride in trained.strides)
    with torch.no_grad():
        detections = trained.postprocess(trained(images(2)), config)
    assert len(detections) == 2
    for one in detections:
        assert isinstance(one, Detections)
        count = len(one.scores)
        assert 0 < count <= 20
        assert (one.boxes_xyxy_px.shape, one.labels.shape) == ((count, 4), (count,))
        assert (one.boxes_xyxy_px.dtype, one.scores.dtype) == (torch.float32, torch.float32)
        assert one.labels.dtype == torch.int64
        assert ((one.labels >= 0) & (one.labels < NUM_CLASSES)).all()
        assert ((one.scores >= 1e-6) & (one.scores <= 1)).all()
        assert (one.scores.diff() <= 0).all()
        assert (one.boxes_xyxy_px[:, 2:] >= one.boxes_xyxy_px[:, :2]).all()
        assert 0 <= one.num_dropped_candidates <= num_anchors - 30


@pytest.mark.parametrize("bf16", [False, True])
def test_the_score_of_every_anchor_point_is_the_product_of_its_factors(trained: nn.Module, bf16: bool) -> None:
    config = PostprocessConfig(score_threshold=0, nms_iou=1, max_detections=10_000)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predictions = trained(images(2))
        scores, detections = trained.anchor_scores(predictions), trained.postprocess(predictions, config)
    num_anchors = sum((64 // stride) ** 2 for stride in trained.strides)
    assert scores.centres_xy_px.shape == (num_anchors, 2)
    assert scores.foreground.shape == (2, num_anchors)
    assert scores.class_given_foreground.shape == (2, num_anchors, NUM_CLASSES)
    for factor in (scores.foreground, scores.class_given_foreground):
        assert factor.dtype == torch.float32
        assert ((factor >= 0) & (factor <= 1)).all()
    products, labels = (scores.foreground.unsqueeze(2) * scores.class_given_foreground).max(dim=2)
    for product, label, one in zip(products, labels, detections, strict=True):
        assert len(one.scores) == num_anchors
        for number in range(NUM_CLASSES):
            expected = product[label == number].sort(descending=True).values
            torch.testing.assert_close(one.scores[one.labels == number], expected, rtol=1e-6, atol=0)


def test_detections_are_chosen_among_the_scored_boxes(trained: nn.Module) -> None:
    config = PostprocessConfig(score_threshold=0, nms_iou=1, max_detections=10_000)
    with torch.no_grad():
        predictions = trained(images(2))
        boxes_xyxy_px, scores = trained.scored_boxes(predictions)
        detections = trained.postprocess(predictions, config)
    num_anchors = sum((64 // stride) ** 2 for stride in trained.strides)
    assert boxes_xyxy_px.shape == (2, num_anchors, 4)
    assert scores.shape == (2, num_anchors, NUM_CLASSES)
    assert boxes_xyxy_px.dtype == scores.dtype == torch.float32
    for boxes, of_classes, one in zip(boxes_xyxy_px, scores, detections, strict=True):
        best, labels = of_classes.max(dim=1)
        order = best.argsort(descending=True, stable=True)
        torch.testing.assert_close(one.scores, best[order], rtol=1e-6, atol=0)
        rows = {(*box, label) for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)}
        assert {
            (*box, label) for box, label in zip(one.boxes_xyxy_px.tolist(), one.labels.tolist(), strict=True)
        } == rows


def test_anchor_points_lie_in_the_middle_of_their_cells(trained: nn.Module) -> None:
    """Finest level first, row by row: as `boxes` decode them."""
    with torch.no_grad():
        scores = trained.anchor_scores(trained(images(1, 64, 96)))
    expected = [
        ((column + 0.5) * stride, (row + 0.5) * stride)
        for stride in trained.strides
        for row in range(64 // stride)
        for column in range(96 // stride)
    ]
    assert scores.centres_xy_px.tolist() == [list(centre) for centre in expected]


def test_the_package_imports_torch_and_the_standard_library_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, file.name


def test_a_copy_under_a_private_name_builds_and_detects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: nn.Module, name: str
) -> None:
    private = f"detector_copy_{name.replace('-', '_')}"
    shutil.copytree(PACKAGE, tmp_path / private, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module(private)
    detector = copy.build(name, num_classes=NUM_CLASSES, **SMALLEST[name]).eval()
    assert {module.__class__.__module__.split(".")[0] for module in detector.modules()} == {private, "torch"}
    detector.load_state_dict(trained.state_dict())
    with torch.no_grad():
        detections = detector.postprocess(detector(images(1)), copy.interface.PostprocessConfig(score_threshold=1e-6))
        expected = trained.postprocess(trained(images(1)), PostprocessConfig(score_threshold=1e-6))
    assert torch.equal(detections[0].scores, expected[0].scores)


def test_the_file_of_each_architecture_is_known() -> None:
    """What tells that code changed looks at the module of `build` and what it imports."""
    modules = {row.build.__module__ for row in models.ARCHITECTURES.values()}
    assert modules <= {f"models.{path.stem}" for path in PACKAGE.glob("*.py")}
    assert {"models.yolox", "models.csf_net", "models.gf_fpn"} <= modules

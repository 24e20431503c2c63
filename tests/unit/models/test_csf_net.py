"""CSF-Net: counts, what the two backbones have to do with each other, and that without fusion it is YOLOv8."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.backbones import run_stages
from models.csf_net import DualBackbone

# Constants of the distribution head, which published totals count as weights.
FIXED = 16


def measured(name: str, **settings: object) -> tuple[int, float]:
    with torch.device("meta"):
        detector = models.build(name, num_classes=1, **settings).eval()
        with FlopCounterMode(display=False) as counter:
            detector(torch.empty(1, 3, 640, 640))
    return sum(p.numel() for p in detector.parameters()) + FIXED, counter.get_total_flops() / 1e9


@pytest.mark.parametrize(
    ("name", "settings", "total", "gflops"),
    [
        ("csf-net-n", {}, 3_217_651, 10.29),
        ("csf-net-s", {}, 11_957_779, 37.10),
        ("csf-net-m", {}, 28_118_131, 105.13),
        ("csf-net-n", {"op": "sum"}, 3_179_507, 10.08),
        ("csf-net-s", {"op": "sum"}, 11_805_715, 36.26),
        ("csf-net-m", {"op": "sum"}, 27_776_371, 103.25),
        ("csf-net-n", {"strides": [4, 8, 16, 32]}, 3_133_300, 14.38),
        ("csf-net-s", {"strides": [4, 8, 16, 32]}, 11_459_028, 45.29),
        ("csf-net-m", {"strides": [4, 8, 16, 32]}, 27_313_076, 124.36),
    ],
)
def test_totals_are_exact(name: str, settings: dict[str, object], total: int, gflops: float) -> None:
    found, found_gflops = measured(name, **settings)
    assert found == total
    assert found_gflops == pytest.approx(gflops, rel=0.001)


@pytest.mark.parametrize("size", ["n", "s", "m"])
def test_a_control_costs_as_much(size: str) -> None:
    """YOLOv8 with a level at stride 4: about the operations of CSF-Net, so that a gain is not only more of them."""
    assert measured(f"yolov8-{size}")[1] < measured(f"csf-net-{size}")[1]
    control = measured(f"yolov8-{size}-p2")[1] / measured(f"csf-net-{size}")[1]
    assert control == pytest.approx({"n": 1.18, "s": 0.99, "m": 0.93}[size], abs=0.006)


def test_strides_and_widths_are_those_of_yolov8() -> None:
    with torch.device("meta"):
        csf, yolo = (models.build(name, num_classes=2) for name in ("csf-net-n", "yolov8-n"))
        images = torch.empty(1, 3, 128, 192)
        fused, plain = csf.backbone(images), yolo.backbone(images)
        details = run_stages(csf.backbone.shallow_stages, csf.backbone.shallow_stem(images))
    assert [x.shape for x in fused] == [x.shape for x in plain]
    assert [128 // x.shape[2] for x in fused] == [4, 8, 16, 32]
    assert [128 // x.shape[2] for x in details] == [4, 8, 8]
    assert csf.neck.out_channels == yolo.neck.out_channels


@pytest.mark.parametrize("size", ["n", "s"])
def test_an_additive_fusion_begins_as_the_yolov8_around_its_deep_backbone(size: str) -> None:
    csf = models.build(f"csf-net-{size}", num_classes=2, op="sum").eval()
    yolo = models.build(f"yolov8-{size}", num_classes=2).eval()
    weights = {name.replace("backbone.deep.", "backbone."): value for name, value in csf.state_dict().items()}
    yolo.load_state_dict({name: weights[name] for name in yolo.state_dict()})
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        a, b = csf(images), yolo(images)
    assert torch.equal(a.side_logits, b.side_logits)
    assert torch.equal(a.class_logits, b.class_logits)


def backbone() -> tuple[DualBackbone, torch.Tensor]:
    torch.manual_seed(0)
    dual = DualBackbone((16, 32, 64, 128, 256), 0.33, "cat").eval()
    return dual, torch.randint(0, 256, (1, 3, 64, 64)).float()


def test_the_shallow_backbone_reaches_the_deep_one_through_the_fusions_alone() -> None:
    dual, images = backbone()
    with torch.no_grad():
        before = dual(images)
        for fusion, channels in zip(dual.fusions, dual.out_channels[:3], strict=True):
            fusion.mix.conv.weight[:, channels:] = 0
        cut = dual(images)
        for stage in (dual.shallow_stem, *dual.shallow_stages):
            for parameter in stage.parameters():
                parameter.mul_(2)
        assert all(torch.equal(x, y) for x, y in zip(dual(images), cut, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(before, cut, strict=True))


@pytest.mark.parametrize("level", [1, 2])
def test_a_loss_at_stride_8_or_16_reaches_both_stems(level: int) -> None:
    dual, images = backbone()
    dual(images)[level].square().sum().backward()
    assert dual.deep.stem.conv.weight.grad.any()
    assert dual.shallow_stem.conv.weight.grad.any()
    # The last shallow stage joins at stride 16.
    reached = [parameter.grad is not None for parameter in dual.shallow_stages[2].parameters()]
    assert all(reached) == any(reached) == (level == 2)


@pytest.mark.parametrize(("height", "width"), [(608, 1024), (32, 96)])
def test_any_multiple_of_the_largest_stride(height: int, width: int) -> None:
    with torch.device("meta"):
        predictions = models.build("csf-net-n", num_classes=2).eval()(torch.empty(1, 3, height, width))
    assert predictions.class_logits.shape == (1, height * width * 21 // 1024, 2)


def test_both_fusions_can_learn() -> None:
    for op in ("cat", "sum"):
        torch.manual_seed(0)
        dual = DualBackbone((16, 32, 64, 128, 256), 0.33, op).train()
        optimizer = torch.optim.SGD(dual.parameters(), lr=1e-3)
        silent = dict(dual.named_parameters())
        for _ in range(2):
            sum(x.square().mean() for x in dual(torch.rand(2, 3, 64, 64) * 255)).backward()
            silent = {name: parameter for name, parameter in silent.items() if not parameter.grad.any()}
            optimizer.step()
            optimizer.zero_grad()
        assert [name for name in silent if isinstance(silent[name], nn.Parameter)] == []

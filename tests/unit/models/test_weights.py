"""Weights of other projects and of relatives: the same numbers come out, or what is missing is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from models.weights import from_public_yolox, is_public_yolox, sources

SIZES = {"yolox-nano": (0.33, 0.25, True), "yolox-tiny": (0.33, 0.375, False)}


def public_yolox(depth: float, width: float, num_classes: int, depthwise: bool) -> nn.Module:
    path = Path(__file__).with_name("public_yolox.py")
    specification = importlib.util.spec_from_file_location("public_yolox", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    torch.manual_seed(0)
    model: nn.Module = module.PublicYolox(depth, width, num_classes, depthwise)
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.running_mean, -0.5, 0.5)
            nn.init.uniform_(child.running_var, 0.5, 2)
    return model.eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_release_checkpoint_gives_its_own_predictions_here(name: str) -> None:
    depth, width, depthwise = SIZES[name]
    public = public_yolox(depth, width, 80, depthwise)
    given = public.state_dict()
    assert is_public_yolox(given)
    renamed = {from_public_yolox(key): value for key, value in given.items()}
    detector: Any = models.build(name, num_classes=80).eval()
    assert renamed.keys() == detector.state_dict().keys()
    detector.load_state_dict(renamed)
    images = torch.randint(0, 256, (1, 3, 96, 64)).float()
    with torch.no_grad():
        expected = torch.cat([level.flatten(2) for level in public(images)], 2).transpose(1, 2)
        got = detector(images)
    torch.testing.assert_close(got.boxes_raw, expected[..., :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.objectness_logits, expected[..., 4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.class_logits, expected[..., 5:], rtol=1e-4, atol=1e-4)


def test_other_classes_leave_the_class_predictors() -> None:
    public = {from_public_yolox(k): v for k, v in shapes(public_yolox(0.33, 0.375, 80, False)).items()}
    known = shapes(models.build("yolox-tiny", num_classes=3))  # type: ignore[arg-type]
    left = known.keys() - sources(known, public).keys()
    assert {name.split(".")[1] for name in left} == {"class_predictors"}
    assert len(left) == 6


@pytest.mark.parametrize(("name", "prefix"), [("yolox-s-p2", ""), ("foreground-probe-s", "base.")])
def test_a_finer_level_leaves_every_stride_its_own_weights(name: str, prefix: str) -> None:
    given = shapes(models.build("yolox-s", num_classes=3))  # type: ignore[arg-type]
    known = shapes(models.build(name, num_classes=3))  # type: ignore[arg-type]
    found = sources(known, given)
    pairs = {
        "backbone.stages.2.0.conv.weight": "backbone.stages.2.0.conv.weight",
        "neck.top_down.layers.1.main.conv.weight": "neck.top_down.layers.0.main.conv.weight",
        "neck.downsamples.2.conv.weight": "neck.downsamples.1.conv.weight",
        "neck.layers.1.merge.norm.weight": "neck.layers.0.merge.norm.weight",
        "head.stems.3.conv.weight": "head.stems.2.conv.weight",
        "head.box_towers.1.0.conv.weight": "head.box_towers.0.0.conv.weight",
    }
    assert {mine: found[prefix + mine] for mine in pairs} == pairs
    assert set(found.values()) == given.keys()
    left = {name.removeprefix(prefix) for name in known.keys() - found.keys()}
    fine = ("neck.top_down.laterals.0.", "neck.top_down.layers.0.", "neck.downsamples.0.", "neck.layers.0.")
    assert all(one.startswith((*fine, "refinement.")) or one.split(".")[2] == "0" for one in left)


def test_foreground_probing_and_the_detector_underneath_take_from_each_other() -> None:
    probe, base = (
        shapes(models.build(name, num_classes=2))  # type: ignore[arg-type]
        for name in ("foreground-probe-n", "yolox-n-p2")
    )
    assert sources(base, probe) == {name: f"base.{name}" for name in base}
    assert sources(probe, base) == {f"base.{name}": name for name in base}


@pytest.mark.parametrize(
    ("name", "given", "prefix"),
    [
        ("fpn-s", "yolox-s", ""),
        ("panet-s", "yolox-s", ""),
        ("gf-fpn-s", "yolox-s", ""),
        ("csf-net-n", "yolov8-n", "deep."),
        ("yolov8-n-p2", "yolov8-n", ""),
    ],
)
def test_relatives_take_backbone_and_the_neck_of_their_strides(name: str, given: str, prefix: str) -> None:
    with torch.device("meta"):
        known, theirs = (shapes(models.build(one, num_classes=3)) for one in (name, given))  # type: ignore[arg-type]
    found = sources(known, theirs)
    assert {one for one in theirs if one.startswith("backbone.")} <= set(found.values())
    # The top-down path from the coarsest level down to stride 8 is common to all.
    shared = {one for one in theirs if one.startswith("neck.top_down.")}
    assert shared <= set(found.values())
    for mine, source in found.items():
        if mine.startswith("backbone."):
            assert mine.replace(f"backbone.{prefix}", "backbone.", 1) == source


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_an_architecture_takes_all_of_its_own(name: str) -> None:
    with torch.device("meta"):
        known = shapes(models.build(name, num_classes=2))  # type: ignore[arg-type]
    assert sources(known, known) == {key: key for key in known}

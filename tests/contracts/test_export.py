"""One size of every family as ONNX: the numbers of the detector, for any batch, by ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from families import SMALLEST, taught
from numpy.typing import NDArray

import models
from flows.export import PARITY_BATCHES, Network, compare, export_onnx, session, write_onnx
from flows.find_model import FoundModel
from models.interface import PostprocessConfig
from training.checkpoint import save_tensors
from training.scoring import load_model, postprocess_config
from training.spec import ArchitectureSpec, RunSpec, ScoringSpec

onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
SIDE_PX = 64
# The one with most to export: all of them take minutes. yolox-nano's file is tested from end to end below.
QUICK = {"foreground-probe-n"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.soak) for name in SMALLEST]
)
def test_onnx_runtime_computes_what_the_detector_does(name: str, tmp_path: Path) -> None:
    assert PARITY_BATCHES == (1, 3)
    torch.manual_seed(0)
    detector = models.build(name, num_classes=3, **SMALLEST[name])
    network = Network(detector).eval()  # type: ignore[arg-type]
    write_onnx(network, SIDE_PX, {}, tmp_path / "model.onnx")
    found = compare(network, session(tmp_path / "model.onnx"), SIDE_PX)
    num_anchors = sum((SIDE_PX // stride) ** 2 for stride in detector.strides)
    assert found["num_compared"] == 4 * num_anchors
    assert found["num_differing"] == 0
    assert found["max_box_error_px"] < 1e-4 * SIDE_PX
    assert found["max_score_error"] < 1e-4


def test_boxes_beyond_the_input_agree_and_others_do_not() -> None:
    """Trained sizes overflow where nothing is."""
    boxes = torch.tensor([[-1e30, 8.0, torch.inf, 9.0], [8.0, 8.0, 16.0, 16.0], [8.0, 8.0, 16.0, 16.0]])
    scores = torch.full((3, 2), 0.5)

    def network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return boxes.expand(len(images), 3, 4), scores.expand(len(images), 3, 2)

    def exported(images: NDArray[Any]) -> list[NDArray[Any]]:
        other = boxes + torch.tensor([[1e25, 0, 0, 0], [0, 0, 0.01, 0], [0, 0, 0, torch.nan]])
        return [other.expand(len(images), 3, 4).numpy(), scores.expand(len(images), 3, 2).numpy()]

    found = compare(cast(Network, network), exported, SIDE_PX)
    assert found["num_compared"] == 4 * 3
    assert found["num_differing"] == 4 * 2


@pytest.fixture
def model(tiny_spec: Callable[..., RunSpec], tmp_path: Path) -> FoundModel:
    spec = tiny_spec(scoring=ScoringSpec(score_threshold=0, max_detections=1000))
    spec = spec.model_copy(update={"architecture": ArchitectureSpec(name="yolox-nano", settings={})})
    detector: Any = models.build("yolox-nano", num_classes=2)
    save_tensors(tmp_path / "weights.safetensors", taught(detector).state_dict())
    return FoundModel(spec, tmp_path / "weights.safetensors", spec.run_key, None, None)


@pytest.mark.slow
def test_a_file_says_how_it_is_used_and_the_manual_s_recipe_works(model: FoundModel, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    exported = export_onnx(model, path)
    assert exported.size_bytes == path.stat().st_size > 1e6
    assert (exported.num_differing, min(exported.pytorch_ms, exported.onnxruntime_ms) > 0) == (0, True)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    told = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert told["class_names"] == ["bright", "dark"]
    assert told["input"]["size_px"] == SIDE_PX
    assert PostprocessConfig(**{k: v for k, v in told["postprocess"].items() if k != "rule"}) == postprocess_config(
        model.spec
    )
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "any number of images"

    # The recipe as printed in the manual, word for word.
    recipe = next(code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "onnxruntime" in code)
    # Of noise, for places that look the same have the same scores.
    picture = np.random.default_rng(1).integers(0, 256, (90, 130, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    scope: dict[str, Any] = {}
    exec(recipe.replace("model.onnx", str(path)).replace("picture.jpg", str(tmp_path / "picture.png")), scope)
    detector: Any = load_model(model.spec, model.weights).eval()
    with torch.inference_mode():
        images = torch.from_numpy(scope["square"]).permute(2, 0, 1)[None]
        (expected,) = detector.postprocess(detector(images), postprocess_config(model.spec))
    assert len(scope["kept"]) == len(expected.scores) > 5
    boxes = scope["boxes_xyxy_px"][scope["kept"]]
    # By place, for rounding may reorder scores that are nearly equal.
    limits = [130, 90, 130, 90]
    distances = np.abs(boxes - (expected.boxes_xyxy_px / scope["scale"]).numpy().clip(0, limits)[:, None]).max(axis=2)
    same = distances.argmin(axis=1)
    assert distances.min(axis=1).max() < 1e-2
    assert sorted(same) == list(range(len(boxes)))
    np.testing.assert_allclose(scope["scores"][scope["kept"]][same], expected.scores, atol=1e-4)
    assert scope["labels"][scope["kept"]][same].tolist() == expected.labels.tolist()
    assert asdict(exported)["path"] == str(path)

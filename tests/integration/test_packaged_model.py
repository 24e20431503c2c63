"""A packaged detector, loaded by MLflow in a process that cannot see this repository."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import models
from data.augment import letterbox
from models.interface import PostprocessConfig
from tracking.client import connect
from tracking.packaging import DigestMismatch, load_verified, package
from tracking.registry import register
from tracking.runs import DatasetRef, ensure_run

ARCHITECTURE = "yolox-nano"
INPUT_SIZE_PX = 96
# Laid out as no writer of JSON would: it has to arrive as it is.
OPERATING_POINT = '{"overall":  null,\n "per_class": {"Fußgänger": null}}\n'
POSTPROCESS = PostprocessConfig(score_threshold=1e-4, max_detections=20)
# Removes what an editable install adds, then proves that nothing of ours is left to import.
ISOLATED = """
import importlib.util, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if entry not in ("", sys.argv[3])]
assert not [name for name in ("models", "data", "tracking", "training") if importlib.util.find_spec(name)]
import mlflow.pyfunc, pandas, torch
torch.set_num_threads(1)
model = mlflow.pyfunc.load_model(sys.argv[1])
with open(sys.argv[2]) as file:
    print(json.dumps(model.predict(pandas.DataFrame({"image": json.load(file)}))))
"""


@pytest.fixture(scope="module")
def detector() -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return models.build(ARCHITECTURE, num_classes=3).eval()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def packaged(detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaged")
    save_file({key: value.contiguous() for key, value in detector.state_dict().items()}, folder / "w.safetensors")
    return package(
        folder / "w.safetensors",
        '{"seed": 0}',
        OPERATING_POINT,
        Path(models.__file__).parent,
        folder / "model",
        architecture=ARCHITECTURE,
        settings={},
        class_names=["car", "van", "bus"],
        input_size_px=INPUT_SIZE_PX,
        postprocess=asdict(POSTPROCESS),
    )


def test_the_model_predicts_without_the_repository_what_the_detector_predicts(
    detector: Any, packaged: Path, tmp_path: Path
) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (50 + 90 * i, 130, 3), dtype=np.uint8) for i in range(2)]
    encoded = [base64.b64encode(cv2.imencode(".png", image)[1].tobytes()).decode() for image in images]
    (tmp_path / "images.json").write_text(json.dumps(encoded))
    command = [sys.executable, "-c", ISOLATED, packaged, tmp_path / "images.json", Path(models.__file__).parents[1]]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120).stdout
    for image, found in zip(images, json.loads(output.splitlines()[-1]), strict=True):
        square, scale = letterbox(image, INPUT_SIZE_PX)
        with torch.inference_mode():
            predictions = detector(torch.from_numpy(square).permute(2, 0, 1)[None])
            (expected,) = detector.postprocess(predictions, POSTPROCESS)
        limits = torch.tensor([image.shape[1], image.shape[0]] * 2)
        boxes_xyxy_px = (expected.boxes_xyxy_px / scale).clamp(min=0).minimum(limits)
        inside = (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(dim=1)
        assert len(found) > 0
        np.testing.assert_allclose([one["bbox_xyxy_px"] for one in found], boxes_xyxy_px[inside], rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose([one["score"] for one in found], expected.scores[inside], rtol=1e-4)
        assert [one["label"] for one in found] == expected.labels[inside].tolist()
        assert {one["class_name"] for one in found} <= {"car", "van", "bus"}


def test_the_folder_holds_no_pickle_and_the_package_verbatim(packaged: Path) -> None:
    files = [path for path in packaged.rglob("*") if path.is_file()]
    assert not [path.name for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".pyc")]
    for source in Path(models.__file__).parent.glob("*.py"):
        (copy,) = packaged.glob(f"artifacts/speck_models_*/{source.name}")
        assert copy.read_bytes() == source.read_bytes()
    assert (packaged / "artifacts" / "operating_point.json").read_bytes() == OPERATING_POINT.encode()
    assert not [line for line in (packaged / "requirements.txt").read_text().split() if "==" not in line or "+" in line]


def test_a_changed_file_is_noticed_before_its_code_runs(packaged: Path, tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    dataset = DatasetRef("dots", "0" * 32 + ".dir", "/srv/dots", {"test": 3})
    run_id = ensure_run(
        client, experiment="dots", run_key="aaa", training_id="aaa", name="x", params={}, tags={}, dataset=dataset,
        start_time_ms=1,
    )  # fmt: skip
    version = register(
        client, model_name="dots", run_id=run_id, run_key="aaa", model_folder=packaged, tags={}, scores={}
    )
    stored = Path(client.get_model_version("dots", str(version)).source.removeprefix("file://"))
    (stored / "__pycache__").mkdir()
    (stored / "__pycache__" / "predictor.cpython-311.pyc").write_bytes(b"left by loading the model in place")
    assert load_verified(client, "dots", version).metadata.signature is not None
    witness = tmp_path / "ran"
    with (stored / "predictor.py").open("a") as file:
        file.write(f"\nopen({str(witness)!r}, 'w')\n")
    with pytest.raises(DigestMismatch, match="dots version 1"):
        load_verified(client, "dots", version)
    assert not witness.exists()

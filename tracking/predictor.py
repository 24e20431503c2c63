"""The code of a registered model: base64 or raw JPEG/PNG in, detections in the image's own pixels out.

A copy of this file travels with each registered version, beside a copy of `models/`, and runs without this
repository. Hence it imports nothing of ours, and letterboxes by the same rule as the loader that trained the model.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

PAD_GREY = 114
MAX_IMAGE_PIXELS = 2**27


class Predictor(PythonModel):  # type: ignore[misc]
    """Loads `weights.safetensors` into the architecture that the model's config names; predicts on the CPU or GPU."""

    def load_context(self, context: PythonModelContext) -> None:
        """Builds the detector from the packaged copy of `models/` and loads its weights."""
        # Read once, when OpenCV starts: a small file must not unfold into gigabytes.
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_IMAGE_PIXELS))
        import torch
        from safetensors.torch import load_file

        config = json.loads(Path(context.artifacts["config"]).read_text(encoding="utf-8"))
        models = _import_package(Path(context.artifacts["models"]))
        self.class_names: list[str] = config["class_names"]
        self.input_size_px: int = config["input_size_px"]
        self.postprocess_config = models.interface.PostprocessConfig(**config["postprocess"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = models.build(config["architecture"], num_classes=len(self.class_names), **config["settings"])
        self.detector.load_state_dict(load_file(context.artifacts["weights"]), strict=True)
        self.detector.to(self.device).eval()

    def predict(self, model_input: pd.DataFrame) -> list[list[dict[str, Any]]]:
        """One list per row of column `image`, by descending score.

        Each detection has `bbox_xyxy_px` in pixels of the image as stored, `score` in 0..1, `label` (0-based) and
        `class_name`. Raises ValueError for a row that is not a readable image.
        """
        return [self._detect(_decode(image, row)) for row, image in enumerate(model_input["image"])]

    def _detect(self, image: Any) -> list[dict[str, Any]]:
        import torch

        height_px, width_px = image.shape[:2]
        square, scale = letterbox(image, self.input_size_px)
        batch = torch.from_numpy(square).permute(2, 0, 1).unsqueeze(0).contiguous().to(self.device)
        with torch.inference_mode():
            (found,) = self.detector.postprocess(self.detector(batch), self.postprocess_config)
        boxes_xyxy_px = found.boxes_xyxy_px.double().cpu() / scale
        finite = boxes_xyxy_px.isfinite().all(dim=1) & found.scores.cpu().isfinite()
        limits = torch.tensor([width_px, height_px, width_px, height_px], dtype=torch.float64)
        boxes_xyxy_px = boxes_xyxy_px.clamp(min=0).minimum(limits)
        kept = finite & (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(dim=1)
        scores, labels = found.scores.cpu()[kept].tolist(), found.labels.cpu()[kept].tolist()
        return [
            {"bbox_xyxy_px": box, "score": score, "label": label, "class_name": self.class_names[label]}
            for box, score, label in zip(boxes_xyxy_px[kept].tolist(), scores, labels, strict=True)
        ]


def letterbox(image: Any, input_size_px: int) -> tuple[Any, float]:
    """The BGR image (H, W, 3) resized to fit, at the top left of a grey (S, S, 3) square, and its scale."""
    import cv2

    height_px, width_px = image.shape[:2]
    scale = min(input_size_px / height_px, input_size_px / width_px)
    if scale != 1.0:
        size = (max(round(width_px * scale), 1), max(round(height_px * scale), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1.0 else cv2.INTER_LINEAR)
    below, right = input_size_px - image.shape[0], input_size_px - image.shape[1]
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(PAD_GREY,) * 3), scale


def _decode(image: str | bytes, row: int) -> Any:
    import cv2
    import numpy as np

    try:
        raw = base64.b64decode(image, validate=True) if isinstance(image, str) else bytes(image)
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except (binascii.Error, cv2.error, TypeError) as error:
        raise ValueError(f"row {row}: not base64 or bytes of a JPEG or PNG image ({error}). Encode it again") from None
    if pixels is None:
        raise ValueError(f"row {row}: the bytes are not a readable JPEG or PNG image. Encode it again")
    return pixels


def _import_package(folder: Path) -> ModuleType:
    """Imports the package in `folder` under the folder's own name, without touching `sys.path`."""
    if folder.name in sys.modules:
        return sys.modules[folder.name]
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[folder.name]
        raise
    return module

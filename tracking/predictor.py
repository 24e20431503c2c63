"""The code of a registered model: base64 or raw JPEG/PNG in, detections in the image's own pixels out.

A copy of this file travels with each registered version, beside a copy of `models/`, and runs without this
repository. Hence it imports nothing of ours, and does by itself all that evaluation does to a picture before the
network and after it: tiles, letterbox, mirror image, precision, merging. Tests hold the two together.

Legend: T tiles of a picture, S input side, N detections.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

PAD_GREY = 114
MAX_IMAGE_PIXELS = 2**27
# OpenCV would read more kinds, by decoders that nobody here has looked at.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# Tiles of a forward pass: as many as when the model was scored.
BATCH = 8


class Letterboxed(NamedTuple):
    """`square` (S, S, 3) with a picture at its top left, `width_px` wide there, enlarged by `scale`."""

    square: Any
    width_px: int
    scale: float


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
        self.suppress = importlib.import_module(f"{models.__name__}.postprocess").suppress_non_maxima
        self.merge = importlib.import_module(f"{models.__name__}.tile_merging").merge_detections
        self.class_names: list[str] = config["class_names"]
        self.input_size_px: int = config["input_size_px"]
        self.tiling: Mapping[str, int] | None = config["tiling"]
        self.flip: bool = config["flip"]
        self.bf16: bool = config["precision"] == "bf16"
        self.postprocess_config = models.interface.PostprocessConfig(**config["postprocess"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = models.build(config["architecture"], num_classes=len(self.class_names), **config["settings"])
        self.detector.load_state_dict(load_file(context.artifacts["weights"]), strict=True)
        self.detector.to(self.device).eval()

    def predict(self, model_input: pd.DataFrame) -> list[list[dict[str, Any]]]:
        """One list per row of column `image`, by descending score.

        Each detection has `bbox_xyxy_px` in pixels of the image as stored, `score` in 0..1, `label` (0-based) and
        `class_name`. Raises MlflowException, which a server answers with status 400, where there is no column `image`
        and for a row that is not a readable image.
        """
        if "image" not in getattr(model_input, "columns", ()):
            raise _refusal("the input has no column 'image'; give one, with a JPEG or PNG in base64 in each row")
        return [self._detect(_decode(image, row)) for row, image in enumerate(model_input["image"])]

    def _detect(self, image: Any) -> list[dict[str, Any]]:
        import numpy as np

        windows = windows_xyxy_px(image.shape[1], image.shape[0], self.tiling)
        parts = [image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows]
        found = [
            one for start in range(0, len(parts), BATCH) for one in self._detect_parts(parts[start : start + BATCH])
        ]
        tile_of = np.repeat(np.arange(len(found)), [len(scores) for _, scores, _ in found])
        origins_px = np.array(windows, np.float64)[tile_of][:, [0, 1, 0, 1]]
        boxes_xyxy_px, scores, labels = (np.concatenate(column) for column in zip(*found, strict=True))
        rows, boxes = self.merge(boxes_xyxy_px + origins_px, scores, labels, tile_of, np.array(windows, np.float64))
        return [
            {
                "bbox_xyxy_px": box,
                "score": float(scores[row]),
                "label": int(labels[row]),
                "class_name": self.class_names[labels[row]],
            }
            for row, box in list(zip(rows, boxes, strict=True))[: self.postprocess_config.max_detections]
        ]

    def _detect_parts(self, parts: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        """Boxes (N, 4) in pixels of the part, scores (N,) and labels (N,) of each part, as NumPy arrays."""
        import numpy as np
        import torch

        boxed = [letterbox(part, self.input_size_px) for part in parts]
        # In the memory layout, and below with the scale's precision, of the batches that the model was scored with.
        images = torch.from_numpy(np.stack([one.square for one in boxed])).permute(0, 3, 1, 2).to(self.device)
        with torch.inference_mode():
            found = self._look(images)
            if self.flip:
                mirrored = images.clone()
                for picture, one in zip(mirrored, boxed, strict=True):
                    # The picture alone is mirrored, not the padding: it has to lie at the top left, as in training.
                    picture[..., : one.width_px] = picture[..., : one.width_px].flip(-1)
                pairs = zip(found, self._look(mirrored), boxed, strict=True)
                found = [self._joined(own, other, one.width_px) for own, other, one in pairs]
        arrays = []
        for (boxes, scores_of, labels_of), part, one in zip(found, parts, boxed, strict=True):
            height_px, width_px = part.shape[:2]
            boxes_xyxy_px = boxes.double().cpu().numpy() / float(np.float32(one.scale))
            scores, labels = scores_of.double().cpu().numpy(), labels_of.cpu().numpy()
            finite = np.isfinite(boxes_xyxy_px).all(axis=1) & np.isfinite(scores)
            boxes_xyxy_px = boxes_xyxy_px.clip(0, [width_px, height_px, width_px, height_px])
            kept = finite & (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(axis=1)
            arrays.append((boxes_xyxy_px[kept], scores[kept], labels[kept]))
        return arrays

    def _look(self, images: Any) -> list[tuple[Any, Any, Any]]:
        """Boxes in input pixels, scores and labels of each image of a batch."""
        import torch

        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            predictions = self.detector(images)
        found = self.detector.postprocess(predictions, self.postprocess_config)
        return [(one.boxes_xyxy_px, one.scores, one.labels) for one in found]

    def _joined(self, own: Any, mirrored: Any, width_px: int) -> tuple[Any, Any, Any]:
        """What was found on a picture and on its mirror image, together."""
        import torch

        x1, y1, x2, y2 = mirrored[0].unbind(1)
        boxes = torch.cat([own[0], torch.stack([width_px - x2, y1, width_px - x1, y2], dim=1)])
        scores, labels = torch.cat([own[1], mirrored[1]]), torch.cat([own[2], mirrored[2]])
        order = scores.argsort(descending=True, stable=True)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        config = self.postprocess_config
        kept = self.suppress(boxes, labels, config.nms_iou, config.max_detections)
        return boxes[kept], scores[kept], labels[kept]


def letterbox(image: Any, input_size_px: int) -> Letterboxed:
    """The BGR image (H, W, 3) resized to fit, at the top left of a grey square."""
    import cv2

    height_px, width_px = image.shape[:2]
    scale = min(input_size_px / height_px, input_size_px / width_px)
    if scale != 1.0:
        size = (max(round(width_px * scale), 1), max(round(height_px * scale), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1.0 else cv2.INTER_LINEAR)
    below, right = input_size_px - image.shape[0], input_size_px - image.shape[1]
    square = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(PAD_GREY,) * 3)
    return Letterboxed(square, image.shape[1], scale)


def windows_xyxy_px(width_px: int, height_px: int, tiling: Mapping[str, int] | None) -> list[tuple[int, int, int, int]]:
    """The tiles of a picture, row by row, the last flush with its border; one for all of it without `tiling`."""
    if tiling is None:
        return [(0, 0, width_px, height_px)]
    size_px, step_px = tiling["size_px"], tiling["size_px"] - tiling["overlap_px"]

    def starts(length_px: int) -> list[int]:
        last = max(length_px - size_px, 0)
        return [*range(0, last, step_px), last]

    return [
        (x, y, min(x + size_px, width_px), min(y + size_px, height_px))
        for y in starts(height_px)
        for x in starts(width_px)
    ]


def _decode(image: Any, row: int) -> Any:
    import cv2
    import numpy as np

    if not isinstance(image, (str, bytes, bytearray, memoryview)):
        raise _refusal(f"row {row}: 'image' must be a JPEG or PNG in base64, or its bytes, not {type(image).__name__}")
    try:
        # Many encoders break lines.
        raw = base64.b64decode("".join(image.split()), validate=True) if isinstance(image, str) else bytes(image)
    except (binascii.Error, ValueError) as error:
        raise _refusal(f"row {row}: 'image' is not base64, without a prefix such as data:, ({error})") from None
    if not raw.startswith(SIGNATURES):
        raise _refusal(f"row {row}: 'image' is no JPEG or PNG ({len(raw)} bytes); encode it again")
    try:
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            limit = os.environ.get("OPENCV_IO_MAX_IMAGE_PIXELS", "")
            raise _refusal(f"row {row}: the image has more than {limit} pixels; cut it into smaller ones") from None
        pixels = None
    if pixels is None:
        raise _refusal(f"row {row}: the {len(raw)} bytes are not a readable JPEG or PNG image; encode it again")
    return pixels


def _refusal(reason: str) -> MlflowException:
    """An error that MLflow's server answers with status 400, and without a traceback."""
    return MlflowException.invalid_parameter_value(reason)


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

"""A detector as an ONNX file: from images to the boxes and scores of all anchor points, and what to do with them.

Suppression stays outside: ONNX has it class by class over all boxes, without the cap on candidates that scores are made
with, and runtimes that are built for one device bring their own. The file's metadata say all that is left to do.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.augment import PAD_GREY
from flows.find_model import FoundModel
from models.interface import Detector
from training.checkpoint import file_sha256
from training.scoring import load_model, postprocess_config, score_options

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# Relative to the largest value: of a clipped box the side of the input, of a score 1.
TOLERANCE = 1e-4
# Where an architecture selects anchor points, rounding may select one instead of an equal other.
MAX_DIFFERING = 1e-3
PARITY_BATCHES = (1, 3)
TIMED_ROUNDS = 20
PATIENCE_S = 20.0


class CannotExport(RuntimeError):
    """Packages are missing, or the exported network does not compute what the detector does."""


@dataclass(frozen=True)
class Exported:
    """`max_box_error_px` and `max_score_error` over the anchor points that agree; `num_differing` do not, of
    `num_compared`. Latencies are medians for one image, measured in turns on the CPU with the same threads.
    """

    path: str
    size_bytes: int
    max_box_error_px: float
    max_score_error: float
    num_differing: int
    num_compared: int
    pytorch_ms: float
    onnxruntime_ms: float
    threads: int


def export_onnx(model: FoundModel, out: Path) -> Exported:
    """Write the model to the file `out`, compare it with the detector in ONNX Runtime, and time both.

    In float32, `images` (B, 3, S, S) to `boxes_xyxy_px` (B, A, 4) and `scores` (B, A, C), for any number B of images.
    The file is there only if both agree.

    Raises:
        CannotExport: packages are missing, or a share of the anchor points above MAX_DIFFERING differs by more than
            TOLERANCE.
        UnfitWeights: see `load_model`.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise CannotExport(f"{', '.join(missing)} not installed; export needs `pip install --editable '.[export]'`")
    side_px = score_options(model.spec).input_size_px
    network = Network(load_model(model.spec, model.weights)).eval()
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_onnx(network, side_px, metadata(model), partial)
        look = session(partial)
        differences = compare(network, look, side_px)
        if differences["num_differing"] > MAX_DIFFERING * differences["num_compared"]:
            raise CannotExport(
                f"{differences['num_differing']} of {differences['num_compared']} anchor points differ from the "
                f"detector's by more than {TOLERANCE:g}; do not use this export. Try the versions of requirements.lock"
            )
        pytorch_ms, onnxruntime_ms = _latencies_ms(network, look, side_px)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(
        str(out),
        out.stat().st_size,
        **differences,
        pytorch_ms=pytorch_ms,
        onnxruntime_ms=onnxruntime_ms,
        threads=torch.get_num_threads(),
    )


class Network(nn.Module):
    """A detector that ends with the boxes and scores of all anchor points."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images float (B, 3, S, S) to boxes (B, A, 4) in input pixels and scores (B, A, C)."""
        detector = cast(Detector, self.detector)
        return detector.scored_boxes(detector(images))


def metadata(model: FoundModel) -> dict[str, str]:
    """What a deployer has to know, by name; all values are JSON."""
    spec, options = model.spec, score_options(model.spec)
    point = model.operating_point
    told = {
        "architecture": spec.architecture.label,
        "run_key": model.run_key,
        "weights_sha256": file_sha256(model.weights),
        "dataset": {"name": spec.dataset.name, "version": spec.dataset.version, "licence": spec.dataset.card.licence},
        "class_names": spec.dataset.card.classes,
        "input": {
            "size_px": options.input_size_px,
            "colours": "BGR, 0 to 255, as float32",
            "letterbox": "scale = min(S / height, S / width); resized by area averaging if scale < 1, else bilinearly; "
            f"at the top left of a square filled with {PAD_GREY}",
            "tiling": None if options.tiling is None else options.tiling.model_dump(),
            "flip": options.flip,
        },
        "postprocess": asdict(postprocess_config(spec))
        | {
            "rule": "of each anchor point the likeliest class; scores from score_threshold on, the best max_candidates "
            "of them; suppression within a class above nms_iou; the best max_detections; boxes / scale, clipped to the "
            "image"
        },
        "operating_point": None if point is None else asdict(point),
        "scored_with_precision": options.precision,
    }
    return {name: json.dumps(value, allow_nan=False) for name, value in told.items()}


def write_onnx(network: Network, side_px: int, told: Mapping[str, str], path: Path) -> None:
    """Write a network for batches of any size of images of `side_px`, with metadata."""
    import onnx

    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, side_px, side_px),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["boxes_xyxy_px", "scores"],
        dynamic_shapes={"images": {0: batch}},
    )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, dict(told))
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def session(path: Path) -> Callable[[NDArray[Any]], list[NDArray[Any]]]:
    """ONNX Runtime on the CPU: images (B, 3, S, S) to boxes and scores, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runtime = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: cast(list[NDArray[Any]], runtime.run(None, {"images": images}))


def compare(network: Network, look: Callable[[NDArray[Any]], list[NDArray[Any]]], side_px: int) -> dict[str, Any]:
    """How far the exported network is from the detector, on noise in batches of PARITY_BATCHES.

    Boxes are compared as detections are made of them, clipped to the input. Sizes are exponentials, which training
    leaves unbounded where nothing is: beyond the input 1e20 px and infinity differ by rounding alone.
    """
    noise = np.random.default_rng(0)
    box_errors, score_errors = [], []
    for batch in PARITY_BATCHES:
        images = noise.integers(0, 256, (batch, 3, side_px, side_px)).astype(np.float32)
        with torch.inference_mode():
            boxes, scores = (value.numpy() for value in network(torch.from_numpy(images)))
        exported_boxes, exported_scores = look(images)
        box_errors.append(np.abs(exported_boxes.clip(0, side_px) - boxes.clip(0, side_px)).max(axis=2).ravel())
        score_errors.append(np.abs(exported_scores - scores).max(axis=2).ravel())
    of_boxes, of_scores = np.concatenate(box_errors), np.concatenate(score_errors)
    # Written so that NaN differs.
    agrees = (of_boxes <= TOLERANCE * side_px) & (of_scores <= TOLERANCE)
    return {
        "max_box_error_px": float(of_boxes[agrees].max(initial=0.0)),
        "max_score_error": float(of_scores[agrees].max(initial=0.0)),
        "num_differing": int((~agrees).sum()),
        "num_compared": len(agrees),
    }


def _latencies_ms(
    network: Network, look: Callable[[NDArray[Any]], list[NDArray[Any]]], side_px: int
) -> tuple[float, float]:
    """Medians of both, one after the other in every round, so that a busy machine is as busy for both."""
    images = np.full((1, 3, side_px, side_px), PAD_GREY, np.float32)
    tensor = torch.from_numpy(images)
    seconds: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    with torch.inference_mode():
        network(tensor), look(images)
        for _ in range(TIMED_ROUNDS):
            times = [time.perf_counter()]
            network(tensor)
            times.append(time.perf_counter())
            look(images)
            times.append(time.perf_counter())
            for values, begin, end in zip(seconds, times, times[1:], strict=False):
                values.append(end - begin)
            if times[-1] - started > PATIENCE_S:
                break
    return 1000 * statistics.median(seconds[0]), 1000 * statistics.median(seconds[1])

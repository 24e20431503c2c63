"""How long a model takes for a picture, and how many it manages in a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data.batch import Batch, collate
from data.loader import DetectionDataset
from data.tiled_pictures import TiledPictures
from evaluation.detector import detect_batch, evaluating
from models.interface import Detector
from training.scoring import SCORING_BATCH, postprocess_config, score_options
from training.spec import RunSpec

MAX_INPUTS = 100
WARM_UP_INPUTS = 10
# A large model on a CPU: fewer inputs than MAX_INPUTS then, and `num_timed` says how many.
PATIENCE_S = 30.0


class NothingToTime(ValueError):
    """A split without an image."""


@dataclass(frozen=True)
class Latency:
    """Times of one process on one device. An input is a picture, or with tiles one of `inputs_per_image`.

    `p50_ms` and `p95_ms` over `num_timed` inputs, one by one; `inputs_per_s` in batches of `batch_size`. These begin
    with decoded and letterboxed pixels in memory and end with detections; `end_to_end_inputs_per_s` has reading and
    decoding in it, one after the other in this process.
    """

    p50_ms: float
    p95_ms: float
    inputs_per_s: float
    end_to_end_inputs_per_s: float
    num_timed: int
    batch_size: int
    inputs_per_image: float
    device: str
    threads: int
    precision: str


def speed_of(latency: Latency) -> dict[str, float]:
    """The numbers that a report shows, by name."""
    return {
        "p50, ms": latency.p50_ms,
        "p95, ms": latency.p95_ms,
        f"inputs per s in batches of {latency.batch_size}": latency.inputs_per_s,
        "inputs per s with decoding": latency.end_to_end_inputs_per_s,
        "threads": latency.threads,
    }


def measure_latency(
    spec: RunSpec, model: nn.Module, inputs: DetectionDataset | TiledPictures, device: torch.device
) -> Latency:
    """Time `model` on the first inputs of a split, at most MAX_INPUTS, after a warm-up.

    Raises:
        NothingToTime: there is no input.
        UndecodableImage: an image is damaged.
    """
    if not len(inputs):
        raise NothingToTime("the split has no image to time; choose another split, or --no-latency")
    single, _ = _time(spec, model, inputs, 1, device)
    batch_size = min(SCORING_BATCH, len(inputs))
    batched, wall_s = _time(spec, model, inputs, batch_size, device)
    p50_ms, p95_ms = (1000 * np.percentile(single, [50, 95])).tolist()
    return Latency(
        p50_ms=p50_ms,
        p95_ms=p95_ms,
        inputs_per_s=batch_size * len(batched) / sum(batched),
        end_to_end_inputs_per_s=batch_size * len(batched) / wall_s,
        num_timed=len(single),
        batch_size=batch_size,
        inputs_per_image=_inputs_per_image(inputs),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        precision=score_options(spec).precision,
    )


def interleaved_p95_ms(
    sides: Sequence[tuple[RunSpec, nn.Module, DetectionDataset | TiledPictures]], device: torch.device
) -> list[float]:
    """95th percentile of the time for a picture, in ms, for each side, as in `Latency`; its tiles one after the other.

    The sides take turns input by input, so that whatever else the machine does slows all of them alike.

    Raises:
        NothingToTime: there is no input.
        UndecodableImage: an image is damaged.
    """
    if not all(len(inputs) for _, _, inputs in sides):
        raise NothingToTime("the split has no image to time: prepare the dataset with some, or ask for no latency")
    num_inputs = min(MAX_INPUTS, *(len(inputs) for _, _, inputs in sides))
    looks = [_look(spec, model, device) for spec, model, _ in sides]
    times: list[list[float]] = [[] for _ in sides]
    with ExitStack() as stack:
        for _, model, _ in sides:
            stack.enter_context(evaluating(cast(Detector, model)))
        for look, (_, _, inputs) in zip(looks, sides, strict=True):
            first = collate([inputs[0]])
            for _ in range(WARM_UP_INPUTS):
                look(first)
        started = time.perf_counter()
        for index in range(num_inputs):
            for look, (_, _, inputs), taken in zip(looks, sides, times, strict=True):
                taken.append(_seconds(look, collate([inputs[index]]), device))
            if time.perf_counter() - started > PATIENCE_S * len(sides):
                break
    return [
        1000 * float(np.percentile(taken, 95)) * _inputs_per_image(inputs)
        for taken, (_, _, inputs) in zip(times, sides, strict=True)
    ]


def _inputs_per_image(inputs: DetectionDataset | TiledPictures) -> float:
    if isinstance(inputs, TiledPictures):
        return len(inputs) / len({tile.image_id for tile in inputs.tiles})
    return 1.0


def _look(spec: RunSpec, model: nn.Module, device: torch.device) -> Callable[[Batch], object]:
    """Detects on a batch, as when the run is scored."""
    return partial(
        detect_batch,
        cast(Detector, model),
        config=postprocess_config(spec),
        device=device,
        bf16=spec.training.precision == "bf16",
        flip=spec.scoring.flip,
    )


def _seconds(look: Callable[[Batch], object], batch: Batch, device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    look(batch)
    _finish(device)
    return time.perf_counter() - started


def _time(
    spec: RunSpec, model: nn.Module, inputs: DetectionDataset | TiledPictures, batch_size: int, device: torch.device
) -> tuple[list[float], float]:
    """Seconds of each whole batch, decoding left out, and of all of them with it."""
    look = _look(spec, model, device)
    loader: DataLoader[Any] = DataLoader(inputs, batch_size=batch_size, collate_fn=collate, drop_last=True)
    times: list[float] = []
    with evaluating(cast(Detector, model)):
        first = collate([inputs[index] for index in range(batch_size)])
        for _ in range(math.ceil(WARM_UP_INPUTS / batch_size)):
            look(first)
        started = time.perf_counter()
        for batch in islice(loader, MAX_INPUTS // batch_size):
            times.append(_seconds(look, batch, device))
            if time.perf_counter() - started > PATIENCE_S:
                break
        return times, time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

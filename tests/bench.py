"""`make bench`: speed as ratios, both sides interleaved in one run, medians. Nothing here is asserted.

Each line reads: what, the two medians, their ratio. Machines are shared and noisy; ratios travel, seconds do not.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import models
from data.decode import read_bgr
from data.headers import read_header
from data.loader import AugmentConfig, DetectionDataset
from models.interface import Targets
from tests.bench_evaluation import evaluation_against_pycocotools, memory_of_a_large_set
from tests.bench_operations import operations_benches
from tests.bench_training import training_benches, waiting_for_data
from training.jobs import ALLOCATOR

REPEATS = 5


def main() -> None:
    """Run all comparisons, on all cores, the loader's on one, with the memory allocator of a run's workers."""
    if os.environ.get("GLIBC_TUNABLES") != ALLOCATOR:
        # Read before a process starts, and never again.
        environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR, "OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench"], environment)
    torch.manual_seed(0)
    evaluation_against_pycocotools()
    memory_of_a_large_set()
    with tempfile.TemporaryDirectory(prefix="speck-bench-") as folder:
        write_photos(Path(folder))
        headers_against_decoding(Path(folder) / "images")
        mosaics_from_the_cache_against_decoding(Path(folder))
        for num_processes in (0, 1):
            waiting_for_data(Path(folder), num_processes)
    training_benches()
    operations_benches()
    step_in_bf16_against_fp32("yolox-nano", size_px=320)
    step_in_bf16_against_fp32("yolox-s", size_px=640)
    for name in ("yolox-nano", "yolox-tiny", "yolox-s", "yolov8-n", "yolov8-n-p2"):
        step_against_assignment(name)
    for size in "ns":
        probe_against_base(size)
    step_against_matrix_products("yolox-s")
    step_against_square_products("yolox-s")


def step_in_bf16_against_fp32(name: str, size_px: int, batch: int = 8) -> None:
    """A training step in plain fp32 against one under bf16 autocast, which `precision: auto` chooses between."""
    detector = _detector(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = _targets(batch, per_image=25, size_px=size_px)
    compare(
        f"{name} step at {size_px} px, batch {batch}: fp32 against bf16",
        lambda: _step(detector, images, targets, bf16=False),
        lambda: _step(detector, images, targets, bf16=True),
    )


def step_against_assignment(name: str, size_px: int = 640, batch: int = 8, per_image: int = 200) -> None:
    """What assignment is of a training step with many objects, both on one thread, as in a worker of one CPU."""
    detector = _detector(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = _targets(batch, per_image=per_image, size_px=size_px)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector(images)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compare(
        f"{name} at {size_px} px, {per_image} objects per image: whole step against assignment",
        lambda: _step(detector, images, targets, bf16=True),
        lambda: cast(Any, detector).assigner(predictions, targets),
    )
    torch.set_num_threads(num_threads)


def probe_against_base(size: str, size_px: int = 640) -> None:
    """Inference with foreground refinement against the detector underneath."""
    probe = _detector(f"foreground-probe-{size}").eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base = cast(Any, probe).base
    images = torch.randint(0, 256, (1, 3, size_px, size_px), dtype=torch.uint8)

    def infer(detector: nn.Module) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            detector(images)

    compare(
        f"foreground-probe-{size} at {size_px} px, one image: with refinement against without",
        lambda: infer(probe),
        lambda: infer(base),
    )


def step_against_matrix_products(name: str, size_px: int = 640, batch: int = 8, per_image: int = 70) -> None:
    """A training step in fp32 against the bare matrix products in it, in their own shapes: the share is the inverse."""
    step = _fp32_step(name, size_px, batch, per_image)
    with MatrixProducts() as products:
        step()
    room = [torch.rand(max(size)) for size in zip(*((n * k, k * c) for n, k, c in products.shapes), strict=True)]

    def multiply() -> None:
        for n, k, c in products.shapes:
            torch.mm(room[0][: n * k].view(n, k), room[1][: k * c].view(k, c))

    title = f"{name} step at {size_px} px, batch {batch}, fp32: against its {len(products.shapes)} matrix products"
    compare(title, step, multiply)


class MatrixProducts(TorchDispatchMode):
    """Notes the shapes (N, K) (K, C) of the matrix products behind all convolutions and linear layers of a step.

    A convolution of K inputs per output, C outputs and N positions is (N, K) (K, C); the gradient of its inputs is
    (N, C) (C, K), that of its weights (K, N) (N, C).
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket
        if name is torch.ops.aten.convolution:
            weight = arguments[1]
            self.shapes.append((result[:, 0].numel(), weight[0].numel(), len(weight)))
        elif name is torch.ops.aten.convolution_backward:
            gradient, _, weight = arguments[:3]
            n, k, c = gradient[:, 0].numel(), weight[0].numel(), len(weight)
            wanted = ((n, c, k), (k, n, c))
            self.shapes += [shape for shape, asked in zip(wanted, arguments[-1], strict=False) if asked]
        elif name in (torch.ops.aten.mm, torch.ops.aten.addmm):
            first, second = arguments[-2:]
            self.shapes.append((*first.shape, second.shape[1]))
        return result


def step_against_square_products(name: str, size_px: int = 640, batch: int = 8, per_image: int = 70) -> None:
    """The same step against as many operations in large square products, the peak that nothing real reaches."""
    step = _fp32_step(name, size_px, batch, per_image)
    with FlopCounterMode(display=False) as counter:
        step()
    side = 2048
    a, b = torch.rand(side, side), torch.rand(side, side)
    num_products = round(counter.get_total_flops() / (2 * side**3))

    def multiply() -> None:
        for _ in range(num_products):
            torch.mm(a, b)

    compare(f"the same: against {num_products} products of {side} x {side}", step, multiply)


def write_photos(folder: Path, count: int = 48) -> None:
    """A prepared training split of 1920x1080 JPEGs with about as many bytes as a camera's, and 50 objects in each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in range(count):
        coarse = rng.integers(0, 256, (68, 120, 3), np.uint8)
        photo = cv2.resize(coarse, (1920, 1080), interpolation=cv2.INTER_CUBIC)
        photo = cv2.add(photo, rng.integers(0, 20, photo.shape, np.uint8))
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), photo, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append(
            {"id": number, "file_name": f"{number}.jpg", "width": 1920, "height": 1080, "ignore_regions_xywh": []}
        )
        for x, y in rng.integers(0, (1860, 1020), (50, 2)).tolist():
            box = {"image_id": number, "category_id": 1, "bbox": [x, y, 60, 60], "area": 3600, "iscrowd": 0}
            annotations.append(box | {"id": len(annotations) + 1})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "car"}]}
    (folder / "annotations" / "train.json").write_text(json.dumps(document))


def headers_against_decoding(images: Path, rounds: int = 20) -> None:
    """What `speck data check` does with each picture, on one core: its header alone against its pixels."""
    paths = sorted(images.iterdir())
    one, two = compare(
        f"{len(paths)} 1080p JPEGs on one core: pixels against {rounds} times their headers",
        lambda: list(map(read_bgr, paths)),
        lambda: [read_header(path) for _ in range(rounds) for path in paths],
        time.process_time,
    )
    print(
        f"    pictures per second of one core: {len(paths) / one:.0f} against {rounds * len(paths) / two:.0f}",
        flush=True,
    )


def mosaics_from_the_cache_against_decoding(folder: Path, size_px: int = 640, num_samples: int = 16) -> None:
    """Mosaic samples a second of one core, neighbours on it left out: always decoded, and after the first epoch."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    naive = _photos(folder, size_px, cache_bytes=0)
    with tempfile.TemporaryDirectory(prefix="speck-bench-") as cache_folder:
        in_memory = _photos(folder, size_px, cache_bytes=2**30)
        in_file = _photos(folder, size_px, cache_bytes=0, cache_folder=Path(cache_folder))
        for place, cached in (("memory", in_memory), ("a file", in_file)):
            list(map(cached.__getitem__, range(len(cached))))
            one, two = compare(
                f"{num_samples} mosaics at {size_px} px of 1080p JPEGs on one core: decoded against kept in {place}",
                lambda: list(map(naive.__getitem__, range(num_samples))),
                lambda cached=cached: list(map(cached.__getitem__, range(num_samples))),  # type: ignore[misc]
                time.process_time,
            )
            print(
                f"    mosaics per second of one core: {num_samples / one:.0f} against {num_samples / two:.0f}",
                flush=True,
            )
    cv2.setNumThreads(threads)


def _photos(folder: Path, size_px: int, **cache: Any) -> DetectionDataset:
    return DetectionDataset(folder, "train", input_size_px=size_px, augment=AugmentConfig(), seed=0, **cache)


def compare(
    title: str,
    first: Callable[[], object],
    second: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Print both medians and first / second; return the medians."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for action, times in zip((first, second), seconds, strict=True):
            started = clock()
            action()
            times.append(clock() - started)
    one, two = (statistics.median(times) for times in seconds)
    print(f"{title}: {one:.3f} s / {two:.3f} s = {one / two:.2f}", flush=True)
    return one, two


def _fp32_step(name: str, size_px: int, batch: int, per_image: int) -> Callable[[], None]:
    detector = _detector(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8)
    targets = _targets(batch, per_image=per_image, size_px=size_px)
    return lambda: _step(detector, images, targets, bf16=False)


def _detector(name: str) -> nn.Module:
    return cast(nn.Module, models.build(name, num_classes=4))


def _targets(batch: int, *, per_image: int, size_px: int) -> Targets:
    count = batch * per_image
    corners = torch.rand(count, 2) * (size_px - 24)
    boxes = torch.cat([corners, corners + 4 + 20 * torch.rand(count, 2)], dim=1)
    index = torch.arange(batch).repeat_interleave(per_image)
    empty = torch.zeros(0, dtype=torch.int64)
    return Targets(boxes, torch.randint(0, 4, (count,)), index, torch.zeros(0, 4), empty)


def _step(detector: nn.Module, images: torch.Tensor, targets: Targets, *, bf16: bool) -> None:
    detector.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        predictions = detector(images)
    losses = cast(Any, detector).criterion(predictions, targets)
    sum(total / losses.counts[term].clamp(min=1) for term, total in losses.sums.items()).backward()


if __name__ == "__main__":
    main()

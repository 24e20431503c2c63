"""A dataset small enough to train on within a test, as prepared files and as a DVC storage that nodes fetch from."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from data.card import DatasetCard
from training.spec import ArchitectureSpec, ComputeSpec, DatasetSpec, RunSpec, ScoringSpec, TrainingSpec

# A shell has what it starts in the background ignore Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A machine that is busy elsewhere makes an example slow, and no test may fail for that.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SIDE_PX = 64
NUM_IMAGES = {"train": 24, "val": 8, "test": 8}
CARD = DatasetCard(
    name="tiny-squares",
    description="Bright and dark squares on noise.",
    licence="CC0-1.0",
    format="coco",
    source="made by the tests",
    classes=("bright", "dark"),
    ignore_rule="covered-half",
)
# A fraction of the smallest architecture: 20 ms for a step of four pictures.
SETTINGS = {"depth": 0.33, "width": 0.125, "depthwise": False, "candidate_mode": "center", "center_radius": 1.5}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="store the golden loss curve anew")


@dataclass(frozen=True)
class TinyDataset:
    """`folder`: the prepared files; `source`: a storage in DVC's layout from which `materialise` fetches `version`."""

    folder: Path
    source: str
    version: str
    card: DatasetCard


def pytest_configure() -> None:
    """Ray reads its authentication mode once, when the first test imports it."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """24/8/8 pictures of 64x64 px with one to four squares of 8 to 20 px each. Read only."""
    root = tmp_path_factory.mktemp("tiny")
    folder = root / "prepared"
    write_squares(folder, NUM_IMAGES)
    return TinyDataset(folder, str(root / "storage"), store(folder, root / "storage"), CARD)


@pytest.fixture(scope="session")
def tiny_spec(tiny: TinyDataset) -> Callable[..., RunSpec]:
    """Makes the spec of a run of seconds on `tiny`; keywords change its `training`, or whole sections by name."""

    def make(
        *, seed: int = 0, scoring: ScoringSpec | None = None, compute: ComputeSpec | None = None, **training: Any
    ) -> RunSpec:
        values = {"epochs": 2, "batch_size": 4, "input_size_px": SIDE_PX, "closing_epochs": 1, "warmup_epochs": 0.5}
        values |= {"precision": "fp32", "ema_ramp_steps": 10.0} | training
        return RunSpec(
            architecture=ArchitectureSpec(name="yolox-nano", settings=SETTINGS),
            dataset=DatasetSpec(name=tiny.card.name, version=tiny.version, card=tiny.card),
            training=TrainingSpec(**values),
            scoring=scoring or ScoringSpec(),
            compute=compute or ComputeSpec(workers=1, max_failures=0),
            seed=seed,
        )

    return make


def write_squares(folder: Path, num_images: dict[str, int]) -> None:
    """Write a prepared dataset: `images/` and `annotations/<split>.json`. The same every time."""
    rng = np.random.default_rng(7)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    image_id = annotation_id = 0
    for split, count in num_images.items():
        images, annotations = [], []
        for index in range(count):
            image_id += 1
            picture = rng.integers(96, 128, (SIDE_PX, SIDE_PX, 3), np.uint8)
            for quarter in rng.permutation(4)[: rng.integers(1, 5)].tolist():
                annotation_id += 1
                label, side = int(rng.integers(2)), int(rng.integers(8, 21))
                # One square per quarter: none covers another.
                x, y = (int(rng.integers(0, 32 - side)) + 32 * part for part in (quarter % 2, quarter // 2))
                picture[y : y + side, x : x + side] = (235, 15)[label]
                annotations.append(
                    {"id": annotation_id, "image_id": image_id, "category_id": label + 1, "bbox": [x, y, side, side],
                     "area": side * side, "iscrowd": 0}
                )  # fmt: skip
            name = f"{split}-{index:03d}.png"
            cv2.imwrite(str(folder / "images" / name), picture)
            images.append(
                {"id": image_id, "file_name": name, "width": SIDE_PX, "height": SIDE_PX, "ignore_regions_xywh": []}
            )
        write_annotations(folder, split, images, annotations)


def write_annotations(folder: Path, split: str, images: list[Any], annotations: list[Any]) -> None:
    """Write one split's file, with the card's classes as categories."""
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CARD.classes)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(document))


def store(folder: Path, storage: Path) -> str:
    """File a folder in DVC's cache layout and return its hash."""
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        entries.append({"md5": _file_under(storage, content, ""), "relpath": path.relative_to(folder).as_posix()})
    return _file_under(storage, json.dumps(entries, sort_keys=True).encode(), ".dir")


def _file_under(storage: Path, content: bytes, suffix: str) -> str:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = storage / "files" / "md5" / md5[:2] / f"{md5[2:]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5

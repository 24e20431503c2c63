"""Decisions where the test pictures are others than those that the champion knew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import TinyDataset, store
from finished import failed

from flows.promote import Promotion
from training.records import RunResult
from training.spec import RunSpec

NAME = "tiny-squares"
MakeSpec = Callable[..., RunSpec]
Finish = Callable[..., RunResult]
PromoteRun = Callable[..., Promotion]

pytestmark = pytest.mark.slow


def moved_on(tiny: TinyDataset, spec: RunSpec, folder: Path, changes: Callable[[Path], None]) -> tuple[Path, RunSpec]:
    """Another version of the dataset in the same storage, and a spec that is trained on it."""
    shutil.copytree(tiny.folder, folder)
    changes(folder)
    version = store(folder, Path(tiny.source))
    return folder, spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"version": version})})


def move(folder: Path, names: int, source: str, target: str) -> None:
    """Give the first pictures of one split to another as well, under new names and ids."""
    from_, to = (folder / "annotations" / f"{split}.json" for split in (source, target))
    one, other = json.loads(from_.read_text()), json.loads(to.read_text())
    for number, image in enumerate(one["images"][:names]):
        name, identity = f"moved-{number}.png", 9000 + number
        shutil.copyfile(folder / "images" / image["file_name"], folder / "images" / name)
        other["images"].append(image | {"file_name": name, "id": identity})
        other["annotations"] += [
            box | {"image_id": identity, "id": 9000 + box["id"]}
            for box in one["annotations"]
            if box["image_id"] == image["id"]
        ]
    to.write_text(json.dumps(other))


def test_pictures_that_the_champion_was_trained_on_are_left_out_for_both(
    finish: Finish, promote: PromoteRun, tiny: TinyDataset, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    promote(finish(0, 0.4))

    def take(folder: Path) -> None:
        move(folder, 3, "train", "test")
        keep_from(folder, 3)

    folder, spec = moved_on(tiny, tiny_spec(seed=1), tmp_path / "moved", take)
    better = finish(1, 1.0, spec=spec, folder=folder)
    decided = promote(better)
    assert (decided.outcome, decided.num_left_out) == ("promoted", 3), decided.reason
    assert decided.verdict is not None
    rows = {row.gate: row for row in decided.verdict.rows}
    assert rows["test pictures trained on"].champion == "3: moved-0.png, moved-1.png, moved-2.png"
    assert rows["test pictures"].candidate == "11"
    assert "on 8 images" in rows["superior in coco/AP"].candidate


def keep_from(folder: Path, first: int) -> None:
    """Take the first pictures out of train."""
    path = folder / "annotations" / "train.json"
    document = json.loads(path.read_text())
    document["images"] = document["images"][first:]
    ids = {image["id"] for image in document["images"]}
    document["annotations"] = [box for box in document["annotations"] if box["image_id"] in ids]
    path.write_text(json.dumps(document))


def test_too_few_pictures_left_are_refused(
    finish: Finish, promote: PromoteRun, tiny: TinyDataset, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    promote(finish(0, 0.4))

    def take(folder: Path) -> None:
        move(folder, 9, "train", "test")
        keep_from(folder, 9)

    folder, spec = moved_on(tiny, tiny_spec(seed=1), tmp_path / "moved", take)
    refused = promote(finish(1, 1.0, spec=spec, folder=folder))
    assert list(failed(refused)) == ["test pictures trained on"]
    assert refused.num_left_out == 9


def test_a_training_picture_in_the_test_split_is_refused(
    finish: Finish, promote: PromoteRun, tiny: TinyDataset, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    folder, spec = moved_on(tiny, tiny_spec(), tmp_path / "leaking", lambda path: move(path, 1, "train", "test"))
    refused = promote(finish(0, 1.0, spec=spec, folder=folder))
    assert failed(refused) == {"test pictures trained on": "1: moved-0.png"}


def test_a_candidate_of_an_older_version_with_a_smaller_test_split_is_refused(
    finish: Finish, promote: PromoteRun, tiny: TinyDataset, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    def grow(folder: Path) -> None:
        cv2.imwrite(str(folder / "images" / "new.png"), np.full((64, 64, 3), 200, np.uint8))
        path = folder / "annotations" / "test.json"
        document = json.loads(path.read_text())
        document["images"].append(document["images"][0] | {"file_name": "new.png", "id": 7777})
        path.write_text(json.dumps(document))

    folder, spec = moved_on(tiny, tiny_spec(seed=1), tmp_path / "grown", grow)
    promote(finish(1, 0.3, spec=spec, folder=folder))
    refused = promote(finish(0, 1.0))
    assert failed(refused) == {"test pictures": "8"}

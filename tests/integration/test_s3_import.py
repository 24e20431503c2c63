"""Import from a real S3 server. Skipped where there is no rclone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest
from botocore.config import Config
from services.s3_server import RCLONE, WITHOUT_RCLONE, S3Service, s3_service

from data.importing import ImportRefused, register
from data.prepare import prepare

pytestmark = pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
# More than a page of a listing.
NUM_IMAGES = 1100


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Service]:
    (tmp_path / "served").mkdir()
    with s3_service(tmp_path / "served") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield service


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    repo = tmp_path / "repo"
    (repo / "data/catalog").mkdir(parents=True)
    (repo / "data/raw").mkdir()
    (repo / "params.yaml").write_text("datasets: []\n")
    return repo


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in range(NUM_IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        cv2.imwrite(str(folder / f"images/{number:04d}.png"), noise)
    for start, split in enumerate(("train", "val", "test")):
        numbers = range(start, NUM_IMAGES, 3)
        document = {
            "images": [{"id": n, "file_name": f"{n:04d}.png", "width": 8, "height": 6} for n in numbers],
            "annotations": [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [1, 1, 3, 2]} for n in numbers],
            "categories": [{"id": 1, "name": "car"}],
        }
        (folder / f"annotations/{split}.json").write_text(json.dumps(document))
    return folder


def upload(source: Path, prefix: str) -> None:
    client = boto3.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket="drone")
    for path in source.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "drone", f"{prefix}/{path.relative_to(source).as_posix()}")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_prefix_of_many_objects(service: S3Service, source: Path, repo: Path) -> None:
    upload(source, "sets/harbour")
    card, notes = register("harbour", "s3://drone/sets/harbour", repo=repo)
    assert card.format == "coco"
    assert tree(repo / "data/raw/harbour") == tree(source)
    assert notes[1].startswith("train 367 images with 367 boxes")
    assert prepare("harbour", repo).is_dir()


def test_wrong_credentials_leave_nothing(
    service: S3Service, source: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(source, "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ImportRefused, match=r"s3://drone/a'.* the credentials"):
        register("harbour", "s3://drone/a", repo=repo)
    assert [*(repo / "data/raw").iterdir(), *(repo / "data/catalog").iterdir()] == []

"""Promotion as teams have it: an MLflow server whose artifacts lie on S3, and the ledger on S3 under a condition."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyDataset
from finished import failed, finish_run
from services.conditional_s3 import LOCALBUCKET, WITHOUT_LOCALBUCKET, conditional_s3_service
from services.mlflow_server import mlflow_service
from services.postgres_server import postgres_missing, postgres_service

from flows.load_gates import load_gates
from flows.promote import automatic, promote_run
from flows.rollback import roll_back
from flows.settings import Settings
from tracking.authority import open_authority
from tracking.client import connect
from tracking.packaging import DigestMismatch, load_verified
from tracking.registry import history
from training.spec import RunSpec

NAME = "tiny-squares"

pytestmark = [
    pytest.mark.skipif(LOCALBUCKET is None, reason=WITHOUT_LOCALBUCKET),
]


@pytest.fixture(params=[pytest.param("SQLite", marks=pytest.mark.soak), "PostgreSQL"])
def served(
    request: pytest.FixtureRequest, tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Settings, Path]]:
    """Settings that name the servers, and the folder behind the bucket."""
    for name in [name for name in os.environ if name.startswith(("SPECK_", "MLFLOW_", "PREFECT_", "RAY_"))]:
        monkeypatch.delenv(name)
    if request.param == "PostgreSQL" and (why := postgres_missing()) is not None:
        pytest.skip(why)
    bucket = tmp_path / "s3" / "bucket"
    bucket.mkdir(parents=True)
    (tmp_path / "mlflow").mkdir()
    with conditional_s3_service(bucket.parent) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        for module in ("data.card", "flows.promote"):
            monkeypatch.setattr(f"{module}.load_card", lambda name: {NAME: tiny.card}[name])
        values = {
            "SPECK_HOME": str(tmp_path / "home"), "SPECK_STORAGE": "s3://bucket/runs", "SPECK_DATA_SOURCE": tiny.source,
            "SPECK_STORE": str(tmp_path / "store"),
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        if request.param == "SQLite":
            yield from _with_server(tmp_path / "mlflow", None, bucket, monkeypatch)
        else:
            with postgres_service() as database:
                yield from _with_server(tmp_path / "mlflow", database, bucket, monkeypatch)


def _with_server(
    folder: Path, database: str | None, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Settings, Path]]:
    with mlflow_service(folder, database=database, artifacts="s3://bucket/mlflow") as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield Settings(), bucket


def test_promoted_loaded_rolled_back_and_refused(
    served: tuple[Settings, Path], tiny: TinyDataset, tiny_spec: Callable[..., RunSpec]
) -> None:
    settings, bucket = served
    client, gates = connect(settings.tracking_uri), load_gates(tiny.card)

    def promote(seed: int, share: float) -> Any:
        result = finish_run(tiny_spec(seed=seed), tiny.folder, settings, share=share, seed=seed)
        return promote_run(client, result, settings, gates, automatic, lambda _: None)

    def aliases() -> dict[str, int]:
        return {alias: version.version for version in history(client, NAME) for alias in version.aliases}

    some, everything, worse = promote(0, 0.3), promote(1, 1.0), promote(2, 0.2)
    outcomes = [promotion.outcome for promotion in (some, everything, worse)]
    assert outcomes == ["promoted", "promoted", "rejected"], [failed(one) for one in (some, everything, worse)]
    assert aliases() == {"champion": 2, "previous": 1, "challenger": 3}
    entries = open_authority(settings.storage_url, settings.home).entries(NAME)
    assert [(entry.generation, entry.action, entry.version) for entry in entries] == [
        (1, "promoted", 1), (2, "promoted", 2), (3, "rejected", 3),
    ]  # fmt: skip
    assert len([*bucket.glob(f"runs/promotions/{NAME}/*.json")]) == 3, "the ledger lies on S3"
    assert [*bucket.glob("mlflow/**/weights.safetensors")], "and so do the models"

    picture = next((tiny.folder / "images").iterdir()).read_bytes()
    (found,) = load_verified(client, NAME, 2).predict([{"image": picture}])
    assert all({"bbox_xyxy_px", "score", "label", "class_name"} == detection.keys() for detection in found)

    roll_back(client, settings, NAME, to=None, why="misses boats at dusk")
    assert aliases()["champion"] == 1
    assert open_authority(settings.storage_url, settings.home).entries(NAME)[-1].why == "misses boats at dusk"

    # Whoever can write to the bucket can change a model, and is found out.
    for path in bucket.glob("mlflow/**/weights.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(DigestMismatch):
        load_verified(client, NAME, 2)

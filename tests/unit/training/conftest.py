from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from unit.training.storage import KINDS, Storage, storage_of

import training.store


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Pictures this small are quicker on one, and on a busy machine ten times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    with storage_of(request.param, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.store, "PATIENCE_S", 1.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)

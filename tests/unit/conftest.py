from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from services.fault_proxy import FaultProxy, fault_proxy
from unit.training.storage import Storage, storage_of


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """Storage on a real S3 server."""
    with storage_of("s3", tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def proxy(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the S3 server."""
    with fault_proxy(bucket.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy

"""A Ray cluster with two CPUs that outlives the flows which use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from training.cluster import embedded_cluster


@contextmanager
def lasting_cluster(home: Path) -> Iterator[dict[str, str]]:
    """Yields the environment of such flows: address, token and the store that they share with its workers."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SPECK_STORE", str(home / "store"))
        with embedded_cluster(home, num_cpus=2) as cluster:
            yield {
                "SPECK_RAY_JOBS_URL": cluster.jobs_url,
                "RAY_ADDRESS": cluster.address,
                "SPECK_STORE": str(home / "store"),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": os.environ["RAY_AUTH_TOKEN_PATH"],
            }

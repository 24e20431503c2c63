"""A real Prefect server on loopback, with credentials, and a process worker, each for the length of a `with` block."""

from __future__ import annotations

import base64
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.servers import ask_prefect, free_port, guarded, prefect_server, read_credentials, running

WORKER_START_S = 300.0


@dataclass(frozen=True)
class PrefectService:
    """`environment` holds what a client process needs, on top of its own environment."""

    folder: Path
    url: str
    api_url: str
    environment: dict[str, str]

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer of `GET api_url + path`, or of `POST` when there is a body; raises HTTPError."""
        token = base64.b64encode(self.environment["PREFECT_API_AUTH_STRING"].encode()).decode()
        return ask_prefect(self.api_url, f"Basic {token}", path, body)


@contextmanager
def prefect_service(folder: Path, *, port: int = 0) -> Iterator[PrefectService]:
    """Serves `folder/prefect`; entering it again with the same folder and port is a restart of the same server."""
    credentials = read_credentials(folder)
    server = prefect_server(folder, free_port(port), credentials)
    with running(server, folder / "prefect.log"):
        environment = {
            "PREFECT_API_URL": f"{server.url}/api",
            "PREFECT_API_AUTH_STRING": f"{credentials.user}:{credentials.password}",
            "PREFECT_HOME": str(folder / "prefect-client"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "true",
        }
        yield PrefectService(folder, server.url, f"{server.url}/api", environment)


@contextmanager
def process_worker(service: PrefectService, pool: str, *, cwd: Path) -> Iterator[int]:
    """Creates the work pool `pool` if need be and runs a process worker for it from `cwd`; yields its group's id.

    Raises RuntimeError with the end of its log when it is not online in time.
    """
    log = service.folder / f"worker-{pool}.log"
    command = (sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process")
    with guarded(command, os.environ | service.environment, log, cwd=cwd) as process:
        deadline = time.monotonic() + WORKER_START_S
        while not _online(service, pool):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the worker of {pool!r} is not online. Its log ends:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process.pid


def _online(service: PrefectService, pool: str) -> bool:
    try:
        workers = service.request(f"/work_pools/{pool}/workers/filter", {})
    except urllib.error.HTTPError:
        return False
    return any(worker["status"] == "ONLINE" for worker in workers)

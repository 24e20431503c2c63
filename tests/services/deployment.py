"""A copy of the checkout whose deployments are on a real Prefect server with a worker, as a user would set them up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos.processes import MARK, left_after, new_mark, wait_until
from services.checkout import copy_checkout
from services.prefect_server import PrefectService, prefect_service, process_worker

POOL = "speck"
RUN_S = 300.0
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Deployed:
    """A copy of the checkout whose deployments are on a server with a worker."""

    folder: Path
    repo: Path
    home: Path
    service: PrefectService
    mark: str

    def worker(self) -> AbstractContextManager[int]:
        """A worker for the length of a block, not in the copy: the deployment knows where its code is."""
        return process_worker(self.service, POOL, cwd=self.folder)

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs Prefect's own command line in the copy."""
        return subprocess.run(
            [sys.executable, "-m", "prefect", *arguments], cwd=self.repo, env=os.environ | self.service.environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def start(self, deployment: str = "train-all/default", **parameters: Any) -> str:
        """`prefect deployment run`; returns the flow run's id."""
        name = uuid.uuid4().hex
        given = [part for key, value in parameters.items() for part in ("--param", f"{key}={json.dumps(value)}")]
        started = self.prefect("deployment", "run", deployment, "--flow-run-name", name, *given)
        assert started.returncode == 0, started.stdout + started.stderr
        (run,) = self.service.request("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return str(run["id"])

    def speck(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `speck` in the copy, told of the server."""
        return subprocess.run(
            [sys.executable, "-m", "flows", *arguments], cwd=self.repo, env=os.environ | self.service.environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        """All runs of a flow."""
        return list(self.service.request("/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}}))

    def cancel(self, run_id: str) -> None:
        """As the page's button does."""
        asked = {"state": {"type": "CANCELLING", "message": "asked by the test"}, "force": False}
        self.service.request(f"/flow_runs/{run_id}/set_state", asked)

    def log(self, run_id: str) -> list[str]:
        """What the flow run and its tasks logged, in order."""
        lines: list[str] = []
        while True:
            wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200, "offset": len(lines)}
            found = self.service.request("/logs/filter", wanted | {"sort": "TIMESTAMP_ASC"})
            lines += [str(line["message"]) for line in found]
            if len(found) < 200:
                return lines

    def state(self, run_id: str) -> dict[str, Any]:
        """Type and message of the flow run's state."""
        return dict(self.service.request(f"/flow_runs/{run_id}")["state"])

    def end(self, run_id: str) -> dict[str, Any]:
        """Waits for the flow run's final state."""
        wait_until(lambda: self.state(run_id)["type"] in FINAL, RUN_S, f"the end of flow run {run_id}", every_s=0.5)
        return self.state(run_id)

    def artifact(self, run_id: str, key: str) -> list[str]:
        """The lines of the Markdown that the flow run left behind under `key`."""
        wanted = {"key": {"any_": [key]}, "flow_run_id": {"any_": [run_id]}}
        (found,) = self.service.request("/artifacts/filter", {"artifacts": wanted})
        return [str(line) for line in found["data"].splitlines()]

    def table(self, run_id: str, key: str) -> list[list[str]]:
        """The cells of the table in it."""
        lines = self.artifact(run_id, key)
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


@contextmanager
def deployed_checkout(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Deployed]:
    """The copy in `folder/repo`, its home in `folder/home`; `environment` is added to that of worker and flows."""
    mark = new_mark()
    repo, home = folder / "repo", folder / "home"
    copy_checkout(repo)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("SPECK_", "MLFLOW_", "PREFECT_", "RAY_")):
                patch.delenv(name)
        ours = {
            MARK: mark,
            "SPECK_HOME": str(home),
            "SPECK_STORE": str(folder / "store"),
            # Stands for the copy's own `.venv`: the packages of this one come from the original checkout.
            "PYTHONPATH": str(repo),
        }
        for name, value in (ours | dict(environment or {})).items():
            patch.setenv(name, value)
        with prefect_service(folder) as service:
            made = Deployed(folder, repo, home, service, mark)
            for step in (("work-pool", "create", POOL, "--type", "process"), ("--no-prompt", "deploy", "--all")):
                done = made.prefect(*step)
                assert done.returncode == 0, done.stdout + done.stderr
            yield made
    assert left_after(mark, 30) == [], "processes that outlived server and worker"

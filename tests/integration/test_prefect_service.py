"""The Prefect fixtures themselves: a worker picks up runs, and takes its flow runs down with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

import psutil
import pytest
from services.prefect_server import PrefectService, prefect_service, process_worker

from infra.processes import is_alive, still_alive
from infra.servers import Credentials
from infra.stack_lifecycle import mark_runs

FLOW = """
import os, time
from pathlib import Path
from prefect import flow

@flow
def wait():
    Path(f"{os.getpid()}.pid").touch()
    time.sleep(300)
"""
DEPLOYMENT = """
deployments:
- {{name: default, entrypoint: "wait.py:wait", work_pool: {{name: speck}}}}
pull:
- prefect.deployments.steps.set_working_directory: {{directory: "{folder}"}}
"""


def prefect(service: PrefectService, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    subprocess.run(
        command, cwd=folder, env=os.environ | service.environment, check=True, capture_output=True, timeout=60
    )


def by_name(service: PrefectService) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in service.request("/flow_runs/filter", {})}


@pytest.mark.soak
def test_a_worker_runs_a_deployment_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "flows"
    folder.mkdir()
    (folder / "wait.py").write_text(FLOW)
    (folder / "prefect.yaml").write_text(DEPLOYMENT.format(folder=folder))
    with prefect_service(tmp_path) as service:
        stranger = PrefectService(tmp_path, service.url, service.api_url, {"PREFECT_API_AUTH_STRING": "speck:guess"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            stranger.request("/admin/version")
        assert caught.value.code == 401
        with process_worker(service, "speck", cwd=folder):
            prefect(service, folder, "deploy", "--all")
            for name in ("running", "to be cancelled"):
                prefect(service, folder, "deployment", "run", "wait/default", "--flow-run-name", name)
            while len(found := list(folder.glob("*.pid"))) < 2:
                time.sleep(0.2)
            flow_runs = [psutil.Process(int(path.stem)) for path in found]
            assert all(map(is_alive, flow_runs))
        assert still_alive(flow_runs, 60) == []

        # What `speck down` tells Prefect then, which it cannot know.
        runs = by_name(service)
        assert {name: run["state"]["type"] for name, run in runs.items()} == dict.fromkeys(runs, "RUNNING")
        cancelling = {"state": {"type": "CANCELLING"}, "force": True}
        service.request(f"/flow_runs/{runs['to be cancelled']['id']}/set_state", cancelling)
        said: list[str] = []
        mark_runs(service.api_url, "Basic nobody", said.append)
        assert said.pop().startswith("Prefect did not say which flow runs end now (HTTP Error 401")
        credentials = service.environment["PREFECT_API_AUTH_STRING"]
        mark_runs(service.api_url, Credentials(*credentials.split(":"), "").basic, said.append)
        assert sorted(line.partition(" was under way and is marked as ")[::2] for line in said) == [
            ("flow run 'running'", "crashed; the next one goes on"),
            ("flow run 'to be cancelled'", "cancelled; the next one goes on"),
        ]
        message = "the stack was stopped; the next run goes on from the newest checkpoint"
        ended = {name: (run["state"]["type"], run["state"]["message"]) for name, run in by_name(service).items()}
        assert ended == {"running": ("CRASHED", message), "to be cancelled": ("CANCELLED", message)}

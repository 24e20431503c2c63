"""The Prefect fixtures themselves: a worker picks up runs, and takes its flow runs down with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import psutil
import pytest
from services.prefect_server import PrefectService, prefect_service, process_worker

FLOW = """
import os, time
from pathlib import Path
from prefect import flow

@flow
def wait():
    Path("pid").write_text(str(os.getpid()))
    time.sleep(300)
"""
DEPLOYMENT = """
deployments:
- {{name: default, entrypoint: "wait.py:wait", work_pool: {{name: pool}}}}
pull:
- prefect.deployments.steps.set_working_directory: {{directory: "{folder}"}}
"""


def prefect(service: PrefectService, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    subprocess.run(
        command, cwd=folder, env=os.environ | service.environment, check=True, capture_output=True, timeout=60
    )


@pytest.mark.timeout(180)
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
        with process_worker(service, "pool", cwd=folder):
            prefect(service, folder, "deploy", "--all")
            prefect(service, folder, "deployment", "run", "wait/default")
            while not (folder / "pid").exists():
                time.sleep(0.2)
            flow_run = psutil.Process(int((folder / "pid").read_text()))
            assert flow_run.is_running()
        assert psutil.wait_procs([flow_run], timeout=10)[1] == []

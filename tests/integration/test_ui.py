"""`python -m infra.ui` as a user starts it: credentials, secrets, and what is left when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from infra.processes import still_alive

ENDS_S = 120.0


@contextmanager
def launched(home: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The launcher, and the two addresses that it printed."""
    command = [sys.executable, "-m", "infra.ui", "--home", str(home)]
    ports = ["--mlflow-port", "0", "--prefect-port", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = [process.stdout.readline() for _ in range(3)]
            yield process, [line.split()[1] for line in printed[:2]]
        finally:
            process.kill()


def status(url: str, authorization: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": authorization} if authorization else {})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_both_interfaces_are_private_and_leave_no_process(tmp_path: Path, ending: signal.Signals) -> None:
    with launched(tmp_path) as (process, (mlflow_url, prefect_url)):
        assert status(f"{mlflow_url}/health") == 200
        assert status(f"{mlflow_url}/api/2.0/mlflow/experiments/get?experiment_id=0") == 401
        assert status(f"{prefect_url}/api/admin/version") == 401
        assert status(prefect_url) == 200, "the login page"

        secret_file = tmp_path / "credentials.json"
        assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
        secrets = [value for key, value in json.loads(secret_file.read_text()).items() if key != "user"]
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4
        shown = " ".join(" ".join(child.cmdline()) for child in children)
        logs = " ".join(path.read_text() for path in (tmp_path / "logs").iterdir())
        assert not [secret for secret in secrets if secret in shown + logs]

        listening = {
            (c.laddr.ip, c.laddr.port) for child in children for c in child.net_connections() if c.status == "LISTEN"
        }
        assert {ip for ip, _ in listening} == {"127.0.0.1"}

        os.kill(process.pid, ending)
        ended = [psutil.Process(process.pid), *children] if ending == signal.SIGINT else children
        assert still_alive(ended, ENDS_S) == []
    for url in (mlflow_url, prefect_url):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=300)

"""A stack as `speck up` starts it in a copy of the checkout, for the length of a `with` block."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import psutil
from botocore.config import Config
from chaos.processes import MARK, left_after, new_mark, wait_until
from services.checkout import copy_checkout

from infra.health import bearer
from infra.processes import marked
from infra.servers import ask, ask_prefect
from infra.stack import BUCKET, Stack, open_stack

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Running:
    """A stack that was started in a copy of the checkout, below `folder`, and what `speck up` printed.

    `commands` are the command lines of all processes of this machine that were seen since before it started.
    """

    folder: Path
    repo: Path
    stack: Stack
    environment: dict[str, str]
    printed: str
    commands: set[bytes]

    def speck(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command, in the shell that started the stack."""
        return subprocess.run(
            [sys.executable, "-m", "flows", *arguments], cwd=self.repo, env=self.environment, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip

    def sourced(self, script: str) -> subprocess.CompletedProcess[str]:
        """Commands in a shell that sourced `stack.env`, as a user types them."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.environment['PATH']}"
        return subprocess.run(
            ["bash", "-c", f"source {self.stack.home}/stack.env\n{script}"], cwd=self.repo,
            env={**self.environment, "PATH": path}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    def status(self) -> dict[str, dict[str, Any]]:
        """What `speck status` knows of each service."""
        return {row["name"]: row for row in json.loads(self.speck("status", "--json").stdout)}

    def prefect(self, path: str, body: object = None) -> Any:
        """An answer of Prefect's API."""
        return ask_prefect(self.stack.api_url, self.stack.credentials.basic, path, body)

    def start(self, deployment: str = "train-all/default", **parameters: Any) -> str:
        """`prefect deployment run` from a shell; returns the flow run's id."""
        name = uuid4().hex
        given = " ".join(f"--param '{key}={json.dumps(value)}'" for key, value in parameters.items())
        started = self.sourced(f"prefect deployment run {deployment} {given} --flow-run-name {name}")
        assert started.returncode == 0, started.stdout + started.stderr
        (run,) = self.prefect("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return str(run["id"])

    def state(self, run_id: str) -> dict[str, Any]:
        """Type, name and message of a flow run's state."""
        return dict(self.prefect(f"/flow_runs/{run_id}")["state"])

    def end(self, run_id: str, timeout_s: float = 600) -> dict[str, Any]:
        """Waits for the flow run's final state."""
        wait_until(lambda: self.state(run_id)["type"] in FINAL, timeout_s, "the end of the flow run", every_s=2)
        return self.state(run_id)

    def log(self, run_id: str) -> str:
        """The latest 200 lines that the flow run and its tasks logged."""
        wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
        return "\n".join(str(line["message"]) for line in self.prefect("/logs/filter", wanted)[::-1])

    def ray(self, path: str) -> Any:
        """An answer of Ray's dashboard."""
        with ask(f"{self.stack.url('ray-head')}/{path}", bearer(self.stack)) as answer:
            return json.load(answer)

    def s3(self, key: str | None = None, secret: str | None = None) -> Any:
        """A client of the S3 server, with the stack's own keys unless others are given."""
        credentials = self.stack.credentials
        return boto3.client(
            "s3", endpoint_url=self.stack.url("s3"), region_name="us-east-1",
            aws_access_key_id=credentials.user if key is None else key,
            aws_secret_access_key=credentials.secret_of("s3") if secret is None else secret,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )  # fmt: skip

    def objects(self, prefix: str) -> list[str]:
        """Names in the stack's bucket."""
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def processes(self) -> list[psutil.Process]:
        """All of the stack."""
        return marked(self.stack.mark(""))


@contextmanager
def stack_of_a_copy() -> Iterator[Running]:
    """Yields when all services work; at the end no process of it may be left."""
    # Not below a test's folder: PostgreSQL's account could not look in there.
    folder, mark = Path(tempfile.mkdtemp(prefix="speck-stack-")), new_mark()
    folder.chmod(0o711)
    repo, home = folder / "repo", folder / "home"
    copy_checkout(repo)
    foreign = ("SPECK_", "MLFLOW_", "PREFECT_", "RAY_", "AWS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {MARK: mark, "SPECK_HOME": str(home), "SPECK_STORE": str(folder / "store"), "PYTHONPATH": str(repo)}
    up = [sys.executable, "-m", "flows", "up"]
    try:
        with commands_seen() as commands:
            done = subprocess.run(
                up, cwd=repo, env=environment, capture_output=True, text=True, timeout=800, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            stack = open_stack(home / "stack", repo)
            assert stack is not None
            yield Running(folder, repo, stack, environment, done.stdout, commands)
    finally:
        subprocess.run([*up[:-1], "down"], cwd=repo, env=environment, check=False, capture_output=True, timeout=300)
        left = left_after(mark, 10)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(stack.sockets)
    assert left == [], "processes that outlived `speck down`"
    assert ports_in_use(stack) == set()


def ports_in_use(stack: Stack) -> set[int]:
    """Those of the stack's ports at which somebody listens."""
    listening = {one.laddr.port for one in psutil.net_connections() if one.status == psutil.CONN_LISTEN}
    return listening & set(stack.ports.values())


@contextmanager
def commands_seen() -> Iterator[set[bytes]]:
    """A set that grows by the command line of every process that lives for a moment within this block."""
    seen: set[bytes] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(path.read_bytes())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()

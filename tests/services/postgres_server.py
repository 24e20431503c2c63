"""A real PostgreSQL server on loopback, with a password, for the length of a `with` block."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.servers import free_port

USER = "speck"
# Debian keeps the servers' programs off the PATH, one folder for each version.
PROGRAMS = os.pathsep.join((os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))))


def postgres_missing() -> str | None:
    """Why there is none here, None where one can be started."""
    if shutil.which("initdb", path=PROGRAMS) is None or shutil.which("pg_ctl", path=PROGRAMS) is None:
        return "needs PostgreSQL's initdb and pg_ctl: apt-get install postgresql"
    if importlib.util.find_spec("psycopg") is None:
        return "needs the driver that MLflow speaks to PostgreSQL with: pip install 'psycopg[binary]'"
    return None


@contextmanager
def postgres_service() -> Iterator[str]:
    """The address of an empty database."""
    password, port = secrets.token_urlsafe(16), free_port()
    # Not below a test's folder: the server refuses to be root, and another user may not look in there.
    folder, account = Path(tempfile.mkdtemp(prefix="speck-postgres-")), _account()
    try:
        (folder / "password").write_text(password)
        for path in (folder, folder / "password"):
            if account:
                os.chown(path, account["user"], account["group"])
        data = ["-D", str(folder / "data")]
        _run(["initdb", *data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "-N"], account)
        options = f"-h 127.0.0.1 -p {port} -c unix_socket_directories= -c fsync=off"
        _run(["pg_ctl", *data, "-w", "-l", str(folder / "log"), "-o", options, "start"], account)
        try:
            yield f"postgresql+psycopg://{USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            _run(["pg_ctl", *data, "-w", "-m", "immediate", "stop"], account)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> dict[str, int]:
    if os.getuid() != 0:
        return {}
    entry = pwd.getpwnam("postgres")
    return {"user": entry.pw_uid, "group": entry.pw_gid}


def _run(command: list[str], account: dict[str, Any]) -> None:
    command[0] = shutil.which(command[0], path=PROGRAMS) or command[0]
    done = subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, **account)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.decode(errors='replace')}")

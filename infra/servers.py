"""The MLflow and Prefect servers of one home folder, on loopback, with credentials from the first day."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
GUARD = Path(__file__).with_name("guard.py")
# A server that died is noticed at once; on cores that train, one that lives needs more than a minute.
START_S = 240.0
STOP_S = 15.0
POLL_S = 0.2


class ServerFailed(RuntimeError):
    """A server did not start, died, or did not stop."""


@dataclass(frozen=True)
class Credentials:
    """One user for all servers of a home; `session_key` signs MLflow's forms. Never printed."""

    user: str
    password: str = field(repr=False)
    session_key: str = field(repr=False)


@dataclass(frozen=True)
class Server:
    """What to start (no secret in `command`), and an address that answers 200 only to the right credentials."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    url: str
    probe_url: str
    credentials: Credentials


def read_credentials(home: Path) -> Credentials:
    """The credentials in `home/credentials.json`, generated at the first call; readable by the owner alone.

    The file appears whole or not at all, and of two first calls at once both return the same.
    """
    path = home / "credentials.json"
    if path.exists():
        return _stored(path)
    if (home / "mlflow-auth.db").exists():
        raise ServerFailed(
            f"{str(path)!r} is missing, but mlflow-auth.db still holds its password. Restore the file, "
            "or delete mlflow-auth.db (and the MLflow users in it) to start with new credentials"
        )
    made = Credentials("speck", secrets.token_urlsafe(24), secrets.token_urlsafe(24))
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=home, prefix=".credentials-") as file:
        json.dump(asdict(made), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
        # Unlike a rename, a link never replaces what another first call has put there.
        with suppress(FileExistsError):
            os.link(file.name, path)
    return _stored(path)


def _stored(path: Path) -> Credentials:
    try:
        return Credentials(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ServerFailed(
            f"{str(path)!r} does not hold user, password and session_key. Restore it, or delete it (and "
            "mlflow-auth.db with the MLflow users in it) to start with new credentials"
        ) from None


def free_port(preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise ServerFailed(f"no free port on {HOST}. Stop a server that is no longer needed")


def mlflow_server(home: Path, port: int, credentials: Credentials) -> Server:
    """MLflow over `home/mlflow.db` and `home/mlartifacts`; writes `home/mlflow-auth.ini`, which holds no secret."""
    ini = home / "mlflow-auth.ini"
    # Hashing the password takes 0.3 s; without the cache that is the price of every single request.
    settings = {
        "default_permission": "READ",
        "database_uri": f"sqlite:///{home / 'mlflow-auth.db'}",
        "auth_cache_ttl_seconds": "60",
    }
    lines = ["[mlflow]", *(f"{key} = {value}" for key, value in settings.items())]
    ini.write_text("\n".join(lines) + "\n", encoding="utf-8")
    url = f"http://{HOST}:{port}"
    options = {
        "--backend-store-uri": f"sqlite:///{home / 'mlflow.db'}",
        "--artifacts-destination": (home / "mlartifacts").as_uri(),
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--app-name": "basic-auth",
    }
    environment = {
        "MLFLOW_AUTH_ADMIN_USERNAME": credentials.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.password,
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.session_key,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Runs background jobs for language-model features: nothing of ours needs its processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = (sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option))
    probe_url = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    return Server("MLflow", command, _environment(environment), url, probe_url, credentials)


def prefect_server(home: Path, port: int, credentials: Credentials) -> Server:
    """Prefect's API and UI over `home/prefect`."""
    url = f"http://{HOST}:{port}"
    environment = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_API_AUTH_STRING": f"{credentials.user}:{credentials.password}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        # Kept in memory, the leases of killed runs would be lost with the server, and their slots never freed.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "true",
    }
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port))
    return Server("Prefect", command, _environment(environment), url, f"{url}/api/admin/version", credentials)


@contextmanager
def running(server: Server, log: Path, *, start_s: float = START_S) -> Iterator[subprocess.Popen[bytes]]:
    """Starts `server`, waits until it answers to its credentials, and stops its whole process group at the end.

    Raises ServerFailed with the end of `log` when it dies or does not answer in time, and when its port stays open.
    """
    with guarded(server.command, server.environment, log) as process:
        deadline = time.monotonic() + start_s
        while _status(server.probe_url, server.credentials) != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                what = "died" if process.poll() is not None else f"did not answer within {start_s:.0f} s"
                end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
                raise ServerFailed(f"{server.name} at {server.url} {what}. Read {str(log)!r}, which ends:\n{end}")
            time.sleep(POLL_S)
        yield process
    if _status(server.probe_url, server.credentials) is not None:
        raise ServerFailed(f"{server.name} at {server.url} still answers after it was stopped. Look for its process")


@contextmanager
def guarded(
    command: tuple[str, ...], environment: Mapping[str, str], log: Path, *, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command`, its output appended to `log`; no process of its group survives this block, nor this process."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-IS", str(GUARD), str(os.getpid()), *command],
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_S)


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    # A server must not inherit the client settings of the shell that starts it.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    return kept | dict(changes)


def _status(url: str, credentials: Credentials) -> int | None:
    token = base64.b64encode(f"{credentials.user}:{credentials.password}".encode()).decode()
    request = urllib.request.Request(url, headers={"Authorization": f"Basic {token}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None

"""The MLflow and Prefect servers of one home folder, on loopback, with credentials from the first day."""

from __future__ import annotations

import base64
import hashlib
import hmac
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
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
GUARD = Path(__file__).with_name("guard.py")
# A server that died is noticed at once; on cores that train, one that lives needs more than a minute.
START_S = 240.0
STOP_S = 15.0
POLL_S = 0.2
# Prefect holds a request for up to 30 s for a connection to its database, for up to 60 s for SQLite's lock.
BUSY_S = 90.0
ANSWER_S = 30.0


class ServerFailed(RuntimeError):
    """A server did not start, died, or did not stop."""


@dataclass(frozen=True)
class Credentials:
    """One user for all servers of a home; `session_key` signs MLflow's forms. Never printed."""

    user: str
    password: str = field(repr=False)
    session_key: str = field(repr=False)

    @property
    def basic(self) -> str:
        """The `Authorization` header of HTTP's basic scheme."""
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}"

    def secret_of(self, server: str) -> str:
        """A secret for one server alone: whoever learns it learns nothing about the password or another's secret."""
        return hmac.new(self.session_key.encode(), server.encode(), hashlib.sha256).hexdigest()[:40]


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


def mlflow_server(
    home: Path, port: int, credentials: Credentials, *, database: str | None = None, artifacts: str | None = None
) -> Server:
    """MLflow over the addresses of a database and of a place for artifacts, by default in `home`.

    Writes `home/mlflow-auth.ini`, which holds no secret.
    """
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
        "--artifacts-destination": artifacts or (home / "mlartifacts").as_uri(),
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--app-name": "basic-auth",
    }
    environment = {
        # Not as an option: it may hold a password.
        "MLFLOW_BACKEND_STORE_URI": database or f"sqlite:///{home / 'mlflow.db'}",
        "MLFLOW_AUTH_ADMIN_USERNAME": credentials.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.password,
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.session_key,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Runs background jobs for language-model features: nothing of ours needs its processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = (sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option))
    return Server("MLflow", command, _environment(environment), url, mlflow_probe(url), credentials)


def mlflow_probe(url: str) -> str:
    """What an MLflow server tells only those that it knows."""
    return f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"


def prefect_server(home: Path, port: int, credentials: Credentials, *, database: str | None = None) -> Server:
    """Prefect's API and UI over the address of a database, by default one in `home/prefect`."""
    url = f"http://{HOST}:{port}"
    environment = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_API_AUTH_STRING": f"{credentials.user}:{credentials.password}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        # For links in notifications.
        "PREFECT_UI_URL": url,
        # Kept in memory, the leases of killed runs would be lost with the server, and their slots never freed.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "true",
    } | ({} if database is None else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database})
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port))
    return Server("Prefect", command, _environment(environment), url, f"{url}/api/admin/version", credentials)


@contextmanager
def running(server: Server, log: Path, *, start_s: float = START_S) -> Iterator[subprocess.Popen[bytes]]:
    """Starts `server`, waits until it answers to its credentials, and stops its whole process group at the end.

    Raises ServerFailed with the end of `log` when it dies or does not answer in time, and when its port stays open.
    """
    with guarded(server.command, server.environment, log) as process:
        deadline = time.monotonic() + start_s
        while status(server.probe_url, server.credentials.basic) != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                what = "died" if process.poll() is not None else f"did not answer within {start_s:.0f} s"
                end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
                raise ServerFailed(f"{server.name} at {server.url} {what}. Read {str(log)!r}, which ends:\n{end}")
            time.sleep(POLL_S)
        yield process
    if status(server.probe_url, server.credentials.basic) is not None:
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


def status(url: str, authorization: str | None = None) -> int | None:
    """The status that a GET answers with, None where nobody answers. `authorization` is the header of that name."""
    try:
        with ask(url, authorization) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def ask(url: str, authorization: str | None = None, body: object = None, *, timeout_s: float = 5.0) -> HTTPResponse:
    """The answer to a GET, or with a `body` to a POST of it as JSON. Raises urllib's HTTPError, and OSError."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    # No proxy: these servers are this machine's own.
    answer: HTTPResponse = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)
    return answer


def ask_prefect(api_url: str, authorization: str, path: str, body: object = None, *, patience_s: float = BUSY_S) -> Any:
    """The JSON answer of Prefect's API to a GET of `path`, or to a POST where there is a body. Raises as `ask`.

    A server on SQLite says 503, or nothing for long, while another of its own writes holds the database; this comes
    again then for `patience_s`, as Prefect's own client does. A `body` has to bear being sent twice.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            with ask(f"{api_url}/{path.lstrip('/')}", authorization, body, timeout_s=ANSWER_S) as answer:
                return json.load(answer)
        except (urllib.error.HTTPError, TimeoutError) as error:
            is_busy = isinstance(error, TimeoutError) or error.code == 503
            if not is_busy or time.monotonic() > until:
                raise
            time.sleep(1.0)

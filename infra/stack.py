"""The stack of one home: which servers run on this machine, where each listens, and how a program reaches them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pwd
import secrets
import shlex
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from infra.servers import HOST, Credentials, ServerFailed, free_port, read_credentials

# In this order they are shown. What a service cannot begin without is in `NEEDS`.
SERVICES = ("postgres", "s3", "mlflow", "prefect", "worker", "ray-head", "ray-node")
NEEDS = {"mlflow": ("postgres", "s3"), "prefect": ("postgres",), "worker": ("prefect",), "ray-node": ("ray-head",)}
# Taken if nothing listens there; else another one.
PREFERRED_PORTS = {
    "postgres": 5432, "s3": 9000, "mlflow": 5000, "prefect": 4200, "ray-gcs": 6379, "ray-dashboard": 8265,
    "ray-client": 10001,
}  # fmt: skip
# Every address of 127.0.0.0/8 is the loopback. Ray would put the machine's outer address in the place of 127.0.0.1.
HEAD, NODE = "127.0.0.2", "127.0.0.3"
WORK_POOL = "speck"
BUCKET = "speck"
# In the environment of all that a service starts.
MARK = "SPECK_STACK_SERVICE"


@dataclass(frozen=True)
class Stack:
    """What was settled when the stack was first started. Its servers' data lie in `home`."""

    home: Path
    repo: Path
    ports: Mapping[str, int]
    has_postgres: bool
    credentials: Credentials

    @property
    def services(self) -> tuple[str, ...]:
        """The names of what runs."""
        return tuple(name for name in SERVICES if self.has_postgres or name != "postgres")

    def needs(self, name: str) -> tuple[str, ...]:
        """What a service waits for before it starts."""
        return tuple(need for need in NEEDS.get(name, ()) if need in self.services)

    @property
    def logs(self) -> Path:
        """One file for each service; `ray-head` and `ray-node` are links to what Ray's many processes write."""
        return self.home / "logs"

    @property
    def sockets(self) -> Path:
        """A private folder whose path is short: a socket's may have 107 characters, and Ray adds many."""
        name = hashlib.sha256(str(self.home).encode()).hexdigest()[:8]
        return Path("/tmp") / f"speck-{os.getuid()}-{name}"

    def mark(self, name: str) -> str:
        """The value of MARK for one service."""
        return f"{self.home}:{name}"

    def url(self, name: str) -> str:
        """Where a service answers, for people; empty for the worker, which listens nowhere."""
        return {
            "postgres": f"{HOST}:{self.ports['postgres']}",
            "worker": "",
            "ray-head": f"http://{HOST}:{self.ports['ray-dashboard']}",
            "ray-node": NODE,
        }.get(name) or (f"http://{HOST}:{self.ports[name]}" if name in self.ports else "")

    @property
    def api_url(self) -> str:
        """Prefect's API."""
        return f"{self.url('prefect')}/api"

    @property
    def token_file(self) -> Path:
        """Ray's token."""
        return self.home / "ray_token"

    def database(self, name: str, driver: str = "") -> str | None:
        """The address of a database in PostgreSQL, with its password; None where SQLite serves."""
        if not self.has_postgres:
            return None
        user = f"{self.credentials.user}:{self.credentials.secret_of('postgres')}"
        return f"postgresql{driver}://{user}@{HOST}:{self.ports['postgres']}/{name}"

    def s3_environment(self) -> dict[str, str]:
        """What S3 clients need: the server's own, Ray's nodes, and a shell's."""
        return {
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": self.credentials.user,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_of("s3"),
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def ray_environment(self) -> dict[str, str]:
        """What Ray's own processes and its clients need."""
        return {
            "RAY_ADDRESS": f"{HEAD}:{self.ports['ray-gcs']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def client_environment(self) -> dict[str, str]:
        """What points a shell, and the worker's flows, at the stack. It holds secrets."""
        user, password = self.credentials.user, self.credentials.password
        return {
            "SPECK_HOME": str(self.home),
            "SPECK_STORAGE": f"s3://{BUCKET}/runs",
            "SPECK_DATA_SOURCE": f"s3://{BUCKET}/dvc",
            # The S3 server takes no conditional writes.
            "SPECK_LEDGER": "home",
            "SPECK_RAY_JOBS_URL": self.url("ray-head"),
            # DVC's own configuration is in the repository, which is not the stack's to change.
            "DVC_GLOBAL_CONFIG_DIR": str(self.home / "dvc"),
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_API_URL": self.api_url,
            "PREFECT_API_AUTH_STRING": f"{user}:{password}",
            "PREFECT_HOME": str(self.home / "prefect-client"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "true",
            **self.s3_environment(),
            **self.ray_environment(),
        }


def stack_home(home: Path) -> Path:
    """The folder of the stack of a home: `stack` in it, or itself for a shell that sourced `stack.env`.

    A folder of its own, because the registry that embedded runs use, and the ledger about it, are others.
    """
    return home if (home / "stack.json").exists() else home / "stack"


def open_stack(home: Path, repo: Path) -> Stack | None:
    """The stack that was started in `home` before; None if none was. Raises ServerFailed when its record is damaged."""
    path = home / "stack.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        ports = {name: int(kept["ports"][name]) for name in PREFERRED_PORTS}
        return Stack(home, repo, ports, bool(kept["has_postgres"]), read_credentials(home))
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        raise ServerFailed(
            f"{str(path)!r} does not hold ports and has_postgres. Delete it; `speck up` makes a new one"
        ) from None


def settle(home: Path, repo: Path) -> Stack:
    """The stack of `home` as it is to start: the former ports where they are still free, the same kind of database.

    Nothing of it may be running. Writes `stack.json`, `stack.env`, which a shell sources, and DVC's remote.
    """
    home.mkdir(parents=True, exist_ok=True)
    former = open_stack(home, repo)
    taken: set[int] = set()
    ports: dict[str, int] = {}
    for name, preferred in (former.ports if former else PREFERRED_PORTS).items():
        port = free_port(preferred)
        while port in taken:
            port = free_port()
        ports[name] = port
        taken.add(port)
    has_postgres = former.has_postgres if former else postgres_folder() is not None and _may_look_in(home)
    stack = Stack(home, repo, ports, has_postgres, read_credentials(home))
    write_private(home / "stack.json", json.dumps({"ports": ports, "has_postgres": has_postgres}, indent=2) + "\n")
    exports = (f"export {name}={shlex.quote(value)}\n" for name, value in stack.client_environment().items())
    write_private(home / "stack.env", "".join(exports))
    (home / "dvc").mkdir(exist_ok=True)
    write_private(
        home / "dvc" / "config", f"[core]\n    remote = stack\n['remote \"stack\"']\n    url = s3://{BUCKET}/dvc\n"
    )
    make_private_folder(stack.sockets)
    for folder in (stack.logs, home / "s3" / BUCKET):
        folder.mkdir(parents=True, exist_ok=True)
    return stack


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read; it is there whole or not at all."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def make_private_folder(folder: Path) -> None:
    """Make a folder in a place where anybody may make one. Raises ServerFailed when somebody else has."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ServerFailed(f"{str(folder)!r} must be a folder that nobody else can use. Remove it, then start again")


def postgres_folder() -> Path | None:
    """Where PostgreSQL's programs are, None where they or the drivers of MLflow and Prefect are missing."""
    if any(importlib.util.find_spec(driver) is None for driver in ("psycopg", "asyncpg")):
        return None
    # Debian keeps them beside the PATH.
    places = [os.environ.get("PATH", os.defpath), *sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    found = shutil.which("initdb", path=os.pathsep.join(places))
    folder = None if found is None else Path(found).resolve().parent
    return folder if folder is not None and (folder / "postgres").exists() else None


def postgres_account() -> pwd.struct_passwd | None:
    """The account that runs PostgreSQL where this is root, which it refuses to be."""
    return pwd.getpwnam("postgres") if os.getuid() == 0 else None


def _may_look_in(home: Path) -> bool:
    if os.getuid() != 0:
        return True
    try:
        postgres_account()
    except KeyError:
        return False
    return all(folder.stat().st_mode & 0o001 for folder in (home, *home.parents))

"""Every place where a secret of the stack could have been left: files, APIs, arguments, environments."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from services.stack import Running

from infra.servers import ask
from infra.stack import MARK, Stack

# Where each may be: a file of its owner alone, in the stack's folder.
AT_HOME = {
    "credentials.json": {"password", "session key"},
    "stack.env": {"password", "S3 secret"},
    "ray_token": {"Ray token"},
}
# And what each service's processes get in their environment.
IN_ENVIRONMENT = {
    "postgres": set[str](),
    "s3": {"S3 secret"},
    "mlflow": {"password", "session key", "S3 secret", "PostgreSQL secret"},
    "prefect": {"password", "PostgreSQL secret"},
    "worker": {"password", "S3 secret"},
    "ray-head": {"S3 secret"},
    "ray-node": {"S3 secret"},
}
# Below a user's home: libraries put files there without being asked.
OF_THE_USER = (".aws", ".config", ".mlflow", ".prefect", ".ray")
PREFECT_LISTS = (
    "artifacts", "automations", "block_documents", "deployments", "flow_runs", "flows", "logs", "task_runs",
    "variables", "work_pools",
)  # fmt: skip
PAGE = 200
RAY_LISTS = (
    "api/jobs/", "api/v0/cluster_metadata", "logical/actors", "nodes?view=summary",
    *(f"api/v0/{kind}?detail=1&limit=10000" for kind in ("tasks", "workers", "nodes", "runtime_envs")),
)  # fmt: skip


def secrets_of(stack: Stack) -> dict[str, str]:
    """By name, what nobody may find."""
    credentials = stack.credentials
    return {
        "password": credentials.password,
        "password in a header": credentials.basic.removeprefix("Basic "),
        "session key": credentials.session_key,
        "S3 secret": credentials.secret_of("s3"),
        "PostgreSQL secret": credentials.secret_of("postgres"),
        "Ray token": stack.token_file.read_text().strip(),
    }


def leaks(running: Running) -> list[str]:
    """What was found where it must not be, one line each: `PLACE: NAME OF THE SECRET`."""
    stack = running.stack
    names = {value.encode(): name for name, value in secrets_of(stack).items()}
    any_secret = re.compile(b"|".join(re.escape(value) for value in names))

    def found(text: bytes) -> set[str]:
        return {names[value] for value in any_secret.findall(text)}

    lines = []
    for path in _files(running):
        with suppress(FileNotFoundError):
            held = found(path.read_bytes())
            allowed = AT_HOME.get(path.name, set()) if path.parent == stack.home else set()
            if held and stat.S_IMODE(path.stat().st_mode) != 0o600:
                lines.append(f"{path}, which is not its owner's alone: {held}")
            elif held - allowed:
                lines.append(f"{path}: {held - allowed}")
    texts = {"argument": b"\n".join(running.commands), "`speck up`": running.printed.encode()}
    texts |= {place: json.dumps(answer).encode() for place, answer in _answers(running)}
    lines += [f"{place}: {held}" for place, text in texts.items() if (held := found(text))]
    for process in running.processes():
        with suppress(psutil.Error):
            environment = process.environ()
            service = environment.get(MARK, "").rpartition(":")[2]
            if service:
                held = found("\n".join(environment.values()).encode()) - IN_ENVIRONMENT[service]
                lines += [f"environment of {service}'s {process.name()}: {held}"] if held else []
    return lines


def _files(running: Running) -> Iterator[Path]:
    folders = [running.folder, running.stack.sockets, *(Path.home() / name for name in OF_THE_USER)]
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _answers(running: Running) -> Iterator[tuple[str, Any]]:
    """All that the APIs tell whoever may ask: databases hold it compressed, or not on the disk yet."""
    for kind in PREFECT_LISTS:
        offset = 0
        while page := running.prefect(f"/{kind}/filter", {"limit": PAGE, "offset": offset}):
            yield f"Prefect's {kind}", page
            offset += PAGE
    for path in ("admin/settings", "work_pools/speck"):
        yield f"Prefect's {path}", running.prefect(f"/{path}")
    for path in RAY_LISTS:
        yield f"Ray's {path}", running.ray(path)
    experiments = _mlflow(running, "experiments/search", {"max_results": 1000})
    ids = [experiment["experiment_id"] for experiment in experiments["experiments"]]
    yield "MLflow's experiments", experiments
    yield "MLflow's runs", _mlflow(running, "runs/search", {"experiment_ids": ids, "max_results": 1000})
    for kind in ("registered-models", "model-versions"):
        yield f"MLflow's {kind}", _mlflow(running, f"{kind}/search?max_results=1000")


def _mlflow(running: Running, path: str, body: object = None) -> Any:
    with ask(f"{running.stack.url('mlflow')}/api/2.0/mlflow/{path}", running.stack.credentials.basic, body) as answer:
        return json.load(answer)

"""A Ray cluster: one that runs, or one on this machine for as long as somebody needs it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

# A job that is stopped keeps a checkpoint first; then Ray kills it.
KILL_AFTER_S = 15
# Variables of a flow that its jobs do not need.
SECRET = ("MLFLOW_", "PREFECT_", "SPECK_WEBHOOK_URL")


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster: `address` for drivers, `jobs_url` of its job API.

    `resources` (CPU, GPU) of a cluster that cannot grow; empty for one that may. `may_grow_to`: what an autoscaler may
    bring it to, where there is one.
    """

    address: str
    jobs_url: str
    resources: dict[str, float] = field(default_factory=dict)
    may_grow_to: dict[str, float] = field(default_factory=dict)


def use_token(home: Path) -> None:
    """Turn Ray's token authentication on for this process and its children, unless the environment already did.

    Must run before ray is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file(home))


def token_file(home: Path) -> Path:
    """The file with the home's token for Ray, made on first use and readable by its owner alone."""
    path = home / "ray_token"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        # Linked into place whole: of two first starts one wins, and a kill leaves no empty token.
        with tempfile.NamedTemporaryFile("w", dir=home, prefix=".ray_token-") as stream, suppress(FileExistsError):
            stream.write(secrets.token_hex(32))
            stream.flush()
            os.link(stream.name, path)
    return path


@contextmanager
def embedded_cluster(home: Path, *, num_cpus: int | None = None) -> Iterator[Cluster]:
    """A cluster on this machine that lives as long as this block, and dies with this process even on SIGKILL.

    Its dashboard and job API listen on loopback. Ray's own daemons listen on all addresses whatever they are told;
    they ask for the token.
    """
    use_token(home)
    # What Ray asks and measures every few seconds is time taken from workers that fill all cores.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "30000")
    # Nobody preempts one's own machine; watching for it costs a process at the start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(KILL_AFTER_S))
    # Ray would let workers yield to everything else: on a shared machine training then takes twice as long.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # When this process is killed, its jobs' drivers would wait a minute for the cluster to come back.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    import ray
    from ray._private import parameter, services

    # `ray.init` has no argument for the job agent's port; at its fixed one a machine holds a single cluster.
    at_any_port = _called_with(parameter, "RayParams", dashboard_agent_listen_port=0)
    # Ctrl-C in a terminal reaches all processes of a group: the cluster's must live until its jobs have stopped.
    in_own_groups = _called_with(services, "ConsolePopen", process_group=0)
    with at_any_port, in_own_groups, _without_secrets(), _signals_kept():
        context = ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=_free_port(),
            _node_ip_address="127.0.0.1",
            configure_logging=False,
            log_to_driver=False,
        )
    try:
        resources = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
        yield Cluster(context.address_info["gcs_address"], f"http://{context.dashboard_url}", resources)
    finally:
        ray.shutdown()


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Hide the flow's credentials while the cluster starts: its processes inherit the environment, and need none."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(SECRET)}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own on SIGTERM; the flow's, which ends its cells in order, must stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _called_with(module: ModuleType, name: str, **arguments: Any) -> Iterator[None]:
    """Have everybody call a function of Ray's with these arguments where they give none of their own."""
    original = getattr(module, name)
    setattr(module, name, partial(original, **arguments))
    try:
        yield
    finally:
        setattr(module, name, original)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

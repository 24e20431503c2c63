"""A real MLflow server on loopback, with credentials, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.servers import free_port, mlflow_server, read_credentials, running


@dataclass(frozen=True)
class MlflowService:
    """`environment` holds what a client process needs."""

    url: str
    environment: dict[str, str]


@contextmanager
def mlflow_service(
    folder: Path, *, port: int = 0, database: str | None = None, artifacts: str | None = None
) -> Iterator[MlflowService]:
    """Serves `folder/mlflow.db`; entering it again with the same folder and port is a restart of the same server.

    `database` and `artifacts`: addresses of other places than this folder.
    """
    credentials = read_credentials(folder)
    server = mlflow_server(folder, free_port(port), credentials, database=database, artifacts=artifacts)
    with running(server, folder / "mlflow.log"):
        environment = {
            "MLFLOW_TRACKING_URI": server.url,
            "MLFLOW_TRACKING_USERNAME": credentials.user,
            "MLFLOW_TRACKING_PASSWORD": credentials.password,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        yield MlflowService(server.url, environment)

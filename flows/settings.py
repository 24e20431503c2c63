"""Endpoints and places, from the environment alone. Nothing here changes a result or enters a run key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from training.store import is_s3

REPO = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """`SPECK_HOME`: what runs leave behind. `SPECK_RAY_JOBS_URL`: job API of a running cluster; unset means embedded.

    `RAY_ADDRESS`: that cluster's own address, where its machine runs several: Ray would take the latest.
    `SPECK_RAY_MAX_CPUS`, `SPECK_RAY_MAX_GPUS`: what its autoscaler may bring it to; by default it does not grow.

    `SPECK_STORAGE`: `s3://bucket/prefix` where the cluster keeps runs; unset means the folder `runs` of the home, which
    all its nodes see. `SPECK_DATA_SOURCE`: DVC storage that the nodes fetch dataset versions from.
    `SPECK_LEDGER`: `storage`, beside the runs, or `home`, in SQLite, where the S3 server takes no conditional writes.
    `MLFLOW_TRACKING_URI`: a tracking server; unset means SQLite and a folder under the home. `SPECK_WEBHOOK_URL`: who
    is told of failures and promotions.
    """

    # An address may hold a password, which an error must not show.
    model_config = SettingsConfigDict(
        env_prefix="SPECK_", env_ignore_empty=True, frozen=True, hide_input_in_errors=True
    )

    home: Path = REPO / ".speck"
    ray_jobs_url: str | None = None
    ray_address: str = Field("auto", validation_alias="RAY_ADDRESS")
    ray_max_cpus: float = Field(0, ge=0)
    ray_max_gpus: float = Field(0, ge=0)
    storage_url: str | None = Field(None, validation_alias="SPECK_STORAGE")
    ledger: Literal["storage", "home"] = "storage"
    data_source: str = str(REPO / ".dvc" / "cache")
    mlflow_tracking_uri: str | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")
    webhook_url: SecretStr | None = None

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        # Jobs run elsewhere: a relative path would mean another folder there.
        return home.expanduser().absolute()

    @field_validator("data_source", mode="after")
    @classmethod
    def _absolute_unless_url(cls, source: str) -> str:
        return source if "://" in source else str(Path(source).expanduser().absolute())

    @field_validator("storage_url", mode="after")
    @classmethod
    def _on_s3(cls, url: str | None) -> str | None:
        if url is not None and not is_s3(url):
            shown = re.sub("//.*@", "//", url)
            raise ValueError(f"SPECK_STORAGE={shown!r} must be s3://bucket/prefix; for a shared folder set SPECK_HOME")
        return None if url is None else url.rstrip("/")

    @property
    def storage(self) -> Path:
        """Where runs keep checkpoints, journals and results; with a `storage_url`, this machine's copies of those."""
        return self.home / "runs"

    @property
    def may_grow_to(self) -> dict[str, float]:
        """CPUs and GPUs that the cluster's autoscaler may bring it to."""
        return {"CPU": self.ray_max_cpus, "GPU": self.ray_max_gpus}

    @property
    def ledger_url(self) -> str | None:
        """Where on S3 the ledger of promotions is; None where it is a file of the home."""
        return self.storage_url if self.ledger == "storage" else None

    @property
    def tracking_uri(self) -> str:
        """The server named in the environment, or the local store."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"


@contextmanager
def prefect_api(home: Path) -> Iterator[None]:
    """The server of PREFECT_API_URL, or one of our own for the length of this block. Enter before importing prefect.

    Differs from the server that Prefect would start by itself: it asks for credentials, and it does not outlive us.
    """
    if "PREFECT_API_URL" in os.environ:
        yield
        return
    from infra.servers import free_port, prefect_server, read_credentials, running

    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    credentials = read_credentials(home)
    server = prefect_server(home, free_port(), credentials)
    with running(server, logs / "prefect-embedded.log"):
        os.environ["PREFECT_API_URL"] = f"{server.url}/api"
        os.environ["PREFECT_API_AUTH_STRING"] = f"{credentials.user}:{credentials.password}"
        try:
            yield
        finally:
            _send_what_waits()


def _send_what_waits() -> None:
    # Left to their own exit handlers, the senders would try for a minute to reach a server that has stopped.
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for sender in (APILogWorker, EventsWorker):
        sender.drain_all(timeout=10)


def prepare_environment(home: Path) -> None:
    """Set what the libraries read at import: no telemetry, Prefect's local state beside ours. What is set stays.

    An empty PREFECT_API_URL names no server, and is taken out.
    """
    defaults = {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    if not os.environ.get("PREFECT_API_URL"):
        # A variable that a shell left empty; Prefect would take it for an address.
        os.environ.pop("PREFECT_API_URL", None)
        defaults["PREFECT_HOME"] = str(home / "prefect")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

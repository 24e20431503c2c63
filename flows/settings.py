"""Endpoints and places, from the environment alone. Nothing here changes a result or enters a run key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from training.store import is_s3

REPO = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """`SPECK_HOME`: what runs leave behind. `SPECK_RAY_JOBS_URL`: job API of a running cluster; unset means embedded.

    `RAY_ADDRESS`: that cluster's own address, where its machine runs several: Ray would take the latest.

    `SPECK_STORAGE`: `s3://bucket/prefix` where the cluster keeps runs; unset means the folder `runs` of the home, which
    all its nodes see. `SPECK_DATA_SOURCE`: DVC storage that the nodes fetch dataset versions from.
    `MLFLOW_TRACKING_URI`: a tracking server; unset means SQLite and a folder under the home.
    """

    # An address may hold a password, which an error must not show.
    model_config = SettingsConfigDict(env_prefix="SPECK_", frozen=True, hide_input_in_errors=True)

    home: Path = REPO / ".speck"
    ray_jobs_url: str | None = None
    ray_address: str = Field("auto", validation_alias="RAY_ADDRESS")
    storage_url: str | None = Field(None, validation_alias="SPECK_STORAGE")
    data_source: str = str(REPO / ".dvc" / "cache")
    mlflow_tracking_uri: str | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")

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
    """Set what the libraries read at import: no telemetry, Prefect's local state beside ours. What is set stays."""
    defaults = {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    if "PREFECT_API_URL" not in os.environ:
        defaults["PREFECT_HOME"] = str(home / "prefect")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

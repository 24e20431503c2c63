"""Endpoints and places, from the environment alone. Nothing here changes a result or enters a run key."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

REPO = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """`SPECK_HOME`: what runs leave behind. `SPECK_RAY_JOBS_URL`: job API of a running cluster; unset means embedded.

    `SPECK_DATA_SOURCE`: DVC storage that the nodes fetch dataset versions from.
    `MLFLOW_TRACKING_URI`: a tracking server; unset means SQLite and a folder under the home.
    """

    model_config = SettingsConfigDict(env_prefix="SPECK_", frozen=True)

    home: Path = REPO / ".speck"
    ray_jobs_url: str | None = None
    data_source: str = str(REPO / ".dvc" / "cache")
    mlflow_tracking_uri: str | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")

    @property
    def storage(self) -> Path:
        """Where runs keep checkpoints, journals and results."""
        return self.home / "runs"

    @property
    def tracking_uri(self) -> str:
        """The server named in the environment, or the local store."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"


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
        # Prefect makes the last part of this path, but not its parents.
        home.mkdir(parents=True, exist_ok=True)
        # A busy machine takes longer than the 20 s that Prefect gives its own server.
        defaults |= {"PREFECT_HOME": str(home / "prefect"), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

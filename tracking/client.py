"""Connecting to MLflow: one client, bounded waiting, errors that a user can act on.

Importing mlflow takes about a second, so it happens inside the functions.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar
from urllib.parse import unquote

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from mlflow import MlflowClient

P = ParamSpec("P")
R = TypeVar("R")

SQLITE = "sqlite:///"
MAX_CAUSE = 300
PART_BYTES = 16 * 2**20
# A dead server costs about 5 s (refused) or 50 s (no answer), where MLflow's own defaults take minutes to hours.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Past this a server with artifacts on S3 has a file sent there in parts, which are a file only once all are there.
    # Through itself, it would answer when S3 has the whole file, which may be later than the time-out above.
    "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE": str(PART_BYTES),
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(PART_BYTES),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
}


class TrackingUnavailable(RuntimeError):
    """The MLflow store cannot be reached, refuses the credentials, or fails by itself. Retry later: nothing is lost."""


def redacted(text: str) -> str:
    """`text` with the user and password of every URL in it replaced by `***`, and the signature of one that has it."""
    text = re.sub(r"(?<=://)[^/\s]+@", "***@", text)
    return re.sub(r"(?i)\b((?:x-amz-)?(?:signature|security-token)=)[^&\s'\"]+", r"\1***", text)


def run_page(tracking_uri: str, run_id: str) -> str | None:
    """Address of a run's page, without the user and password of the server's; None where the store is no server."""
    if tracking_uri.startswith(SQLITE):
        return None
    return f"{re.sub('(?<=://)[^/]+@', '', tracking_uri).rstrip('/')}/#/runs/{run_id}"


def artifact_root(tracking_uri: str) -> Path | None:
    """`mlartifacts/` beside an SQLite store; None for a server, which decides for itself."""
    return database(tracking_uri).parent / "mlartifacts" if tracking_uri.startswith(SQLITE) else None


def database(tracking_uri: str) -> Path:
    """The file of an SQLite `tracking_uri`, absolute."""
    return Path(unquote(tracking_uri.removeprefix(SQLITE))).absolute()


def connect(tracking_uri: str) -> MlflowClient:
    """A client that has already spoken once to the store at `tracking_uri` (`sqlite:///...` or `http(s)://...`).

    A server's credentials are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. An SQLite store
    is created if need be, with its parent folders.

    Raises TrackingUnavailable when the store does not answer in time or refuses the credentials.
    """
    prepare_environment()
    if not tracking_uri.startswith(SQLITE):
        return _connect(tracking_uri)
    path = database(tracking_uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # MLflow would retry an unreadable file for minutes, and two processes would race to create its tables.
        with FileLock(f"{path}.lock", timeout=120):
            with sqlite3.connect(path) as file:
                file.execute("PRAGMA schema_version")
            return _connect(tracking_uri)
    except (OSError, sqlite3.Error, Timeout) as error:
        raise _unavailable(tracking_uri, error) from error


def prepare_environment() -> None:
    """Sets the variables of `ENVIRONMENT` that the user has not set; to be called before mlflow is used."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _connect(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise _unavailable(tracking_uri, error, _status(error)) from None
    return client


def speaks_to_store(
    function: Callable[Concatenate[MlflowClient, P], R],
) -> Callable[Concatenate[MlflowClient, P], R]:
    """Turns a store's failure inside `function(client, ...)` into TrackingUnavailable; other errors pass."""

    @functools.wraps(function)
    def call(client: MlflowClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        import requests
        from mlflow.exceptions import MlflowException

        try:
            return function(client, *args, **kwargs)
        except MlflowException as error:
            status = _status(error)
            if status in (401, 403, 429) or status >= 500:
                raise _unavailable(client.tracking_uri, error, status) from None
            raise
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            raise _unavailable(client.tracking_uri, error, status) from None
        except Exception as error:
            if not _is_of_s3(error):
                raise
            raise _unavailable(client.tracking_uri, error) from None

    return call


def _is_of_s3(error: Exception) -> bool:
    """Whether a server that leaves artifacts to its clients sent this one to an S3 that failed.

    The packages are named and not imported: that takes 0.2 s, and most stores need none of them.
    """
    return type(error).__module__.partition(".")[0] in ("boto3", "botocore")


def _status(error: Exception) -> int:
    return int(error.get_http_status_code())  # type: ignore[attr-defined]


def _unavailable(tracking_uri: str, error: Exception, status: int = 0) -> TrackingUnavailable:
    if status in (401, 403):
        rule = f"the server refused the credentials ({status})"
        remedy = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user with write permission"
    else:
        rule = "the tracking store must be reachable and writable"
        remedy = (
            "Start the server or correct MLFLOW_TRACKING_URI. What runs have to tell is kept beside them, and "
            "`speck sync` sends it"
        )
    cause = redacted(str(error)).strip().splitlines() or [type(error).__name__]
    shown = cause[0] if len(cause[0]) <= MAX_CAUSE else f"{cause[0][:MAX_CAUSE]}..."
    return TrackingUnavailable(f"{redacted(tracking_uri)!r}: {rule}. {remedy}. Cause: {shown}")

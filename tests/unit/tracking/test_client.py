from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from tracking.client import TrackingUnavailable, artifact_root, connect, redacted, speaks_to_store


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:secret@host:5000/x", "http://***@host:5000/x"),
        ("to s3://key:se@cret@bucket/a and https://t0ken@host", "to s3://***@bucket/a and https://***@host"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("mail me@host", "mail me@host"),
        ("PUT http://s3/a?X-Amz-Signature=0af&X-Amz-Date=1", "PUT http://s3/a?X-Amz-Signature=***&X-Amz-Date=1"),
        ("'http://s3/a?x-amz-security-token=0af'", "'http://s3/a?x-amz-security-token=***'"),
    ],
)
def test_credentials_in_urls_are_redacted_and_nothing_else(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_only_an_embedded_store_keeps_artifacts_beside_its_database() -> None:
    assert artifact_root("sqlite:////var/speck/mlflow.db") == Path("/var/speck/mlartifacts")
    assert artifact_root("https://host/mlflow") is None


def test_a_refused_connection_is_reported_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(TrackingUnavailable) as caught:
            connect(f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}")
    assert "secret" not in str(caught.value)
    assert "`speck sync` sends it" in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TrackingUnavailable):
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("broken", ["folder is a file", "database is not SQLite"])
def test_an_unusable_sqlite_store_is_reported_at_once(tmp_path: Path, broken: str) -> None:
    (tmp_path / "taken").write_text("not a database, and not a folder" * 100)
    path = tmp_path / "taken" / "mlflow.db" if broken == "folder is a file" else tmp_path / "taken"
    with pytest.raises(TrackingUnavailable, match="reachable and writable"):
        connect(f"sqlite:///{path}")


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, tracking.runs, tracking.registry, tracking.promotion; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_s3_that_the_server_sent_us_to_and_that_fails_is_no_traceback() -> None:
    @speaks_to_store
    def read(client: Any) -> None:
        raise EndpointConnectionError(endpoint_url="http://ada:secret@127.0.0.1:9/bucket")

    @speaks_to_store
    def fail(client: Any) -> None:
        raise KeyError("ours")

    client = SimpleNamespace(tracking_uri="http://127.0.0.1:5000")
    with pytest.raises(TrackingUnavailable, match=r"must be reachable and writable.*Could not connect") as told:
        read(client)  # type: ignore[arg-type]
    assert "secret" not in str(told.value)
    with pytest.raises(KeyError, match="ours"):
        fail(client)  # type: ignore[arg-type]

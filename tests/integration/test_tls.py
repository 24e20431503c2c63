"""Servers behind TLS, with an authority of one's own: settings of the environment are all that the clients need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from services.mlflow_server import mlflow_service
from services.prefect_server import prefect_service
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service
from services.tls_proxy import self_signed, tls_proxy

# The clients that Speck has, each of which trusts whom it likes.
CLIENTS = """
import json, os

def prefect():
    from prefect.client.orchestration import get_client
    with get_client(sync_client=True) as client:
        client.read_work_pools()

def mlflow():
    from tracking.client import connect
    connect(os.environ["MLFLOW_TRACKING_URI"]).search_experiments()

def s3():
    import boto3
    boto3.client("s3").list_objects_v2(Bucket="runs")

def dvc():
    from dvc_s3 import S3FileSystem
    S3FileSystem(endpointurl=os.environ["AWS_ENDPOINT_URL"]).exists("runs/some")

def doctor():
    from flows.doctor_services import endpoints
    from flows.settings import Settings
    found = [(one.name, one.answer("ours"), one.answer("wrong")) for one in endpoints(Settings())]
    assert [(name, ours) for name, ours, _ in found] == [("Prefect", 200), ("MLflow", 200), ("S3", 200)], found
    assert all(wrong in (401, 403) for _, _, wrong in found), found

def outcome(client):
    try:
        client()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__} {error.__context__}"
    return "answered"

print(json.dumps({client.__name__: outcome(client) for client in (prefect, mlflow, s3, dvc, doctor)}))
"""


@pytest.mark.soak
@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_clients_take_an_authority_by_a_setting_and_refuse_without(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    for name in ("mlflow", "prefect", "s3/runs"):
        (tmp_path / name).mkdir(parents=True)
    with ExitStack() as stack:

        def behind_tls(url: str) -> str:
            return stack.enter_context(tls_proxy(int(url.rpartition(":")[2]), certificate, key))

        mlflow = stack.enter_context(mlflow_service(tmp_path / "mlflow"))
        prefect = stack.enter_context(prefect_service(tmp_path / "prefect"))
        s3 = stack.enter_context(s3_service(tmp_path / "s3"))
        environment = {
            **os.environ, **mlflow.environment, **prefect.environment, **s3.environment,
            "MLFLOW_TRACKING_URI": behind_tls(mlflow.url),
            "PREFECT_API_URL": f"{behind_tls(prefect.url)}/api",
            "AWS_ENDPOINT_URL": behind_tls(s3.url),
            "SPECK_STORAGE": "s3://runs/some", "SPECK_HOME": str(tmp_path / "home"),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "AWS_MAX_ATTEMPTS": "1",
        }  # fmt: skip

        def outcomes(**settings: str) -> dict[str, str]:
            done = subprocess.run(
                [sys.executable, "-c", CLIENTS], env={**environment, **settings}, capture_output=True, text=True,
                timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return dict(json.loads(done.stdout.splitlines()[-1]))

        trusted = {name: str(certificate) for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")}
        assert outcomes(**trusted) == dict.fromkeys(("prefect", "mlflow", "s3", "dvc", "doctor"), "answered")
        refused = outcomes()
    assert all("certificate verify failed" in refused[name].lower() for name in ("prefect", "mlflow")), refused
    assert all("SSL" in refused[name] for name in ("s3", "dvc")), refused
    assert "None" in refused["doctor"], refused

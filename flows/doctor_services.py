"""The servers that this process's environment names, asked with its credentials, with none, and with wrong ones."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from flows.settings import Settings
from infra.servers import Credentials, ask, mlflow_probe, status

WRONG = "no-such-password"
UNREACHABLE = ("does not answer", "`speck up` where it is the stack's; else start it, or correct its address")


@dataclass(frozen=True)
class Endpoint:
    """A server: `answer` gives the HTTP status for `ours`, `wrong` and `none` of credentials; None if it is away.

    `version` is that of the `package` that it is made of; None where it does not tell.
    """

    name: str
    url: str
    answer: Callable[[str], int | None]
    package: str | None = None
    version: Callable[[], str | None] = lambda: None


def endpoints(settings: Settings) -> Iterator[Endpoint]:
    """The servers of the environment; none where everything is embedded."""
    environment = os.environ
    if url := environment.get("PREFECT_API_URL"):
        user, _, password = environment.get("PREFECT_API_AUTH_STRING", "").partition(":")
        yield _with_password("Prefect", url, f"{url}/admin/version", f"{url}/admin/version", user, password)
    if (url := settings.mlflow_tracking_uri) and url.startswith("http"):
        user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
        yield _with_password("MLflow", url, mlflow_probe(url), f"{url.rstrip('/')}/version", user, password)
    if url := settings.ray_jobs_url:
        yield _ray(url)
    addresses = (settings.storage_url or "", settings.data_source)
    if place := next((address for address in addresses if address.startswith("s3://")), None):
        yield Endpoint("S3", environment.get("AWS_ENDPOINT_URL", "https://s3.amazonaws.com"), _s3(place))


def refusal(endpoint: Endpoint) -> tuple[str, str] | None:
    """What is wrong with a server, and the remedy; None when it answers to our credentials and to no others."""
    if (answer := endpoint.answer("ours")) is None:
        return UNREACHABLE
    if answer != 200:
        remedy = "source the stack's `stack.env` anew, or correct the credentials in the environment"
        return f"answers {answer} to our credentials", remedy
    for kind in ("none", "wrong"):
        # rclone's word for a request without a signature is 400.
        if (answer := endpoint.answer(kind)) not in {400, 401, 403}:
            return f"answers {answer} to {kind} credentials", "start it with authentication: docs/stack.md"
    return None


def clock_skew_s(endpoint: Endpoint) -> float | None:
    """How far a server's clock is ahead of ours, to a second; None where it does not tell."""
    try:
        try:
            with ask(endpoint.url) as answer:
                date = answer.headers.get("Date")
        except urllib.error.HTTPError as error:
            date = error.headers.get("Date")
    except (OSError, ValueError):
        return None
    return None if date is None else parsedate_to_datetime(date).timestamp() - time.time()


def _with_password(name: str, url: str, probe: str, version_url: str, user: str, password: str) -> Endpoint:
    headers = {"ours": Credentials(user, password, "").basic, "wrong": Credentials(user, WRONG, "").basic}
    return Endpoint(
        name,
        url,
        lambda kind: status(probe, headers.get(kind)),
        name.lower(),
        lambda: _told(version_url, headers["ours"]),
    )


def _told(url: str, authorization: str) -> str | None:
    """The first version number in what a server answers."""
    try:
        with ask(url, authorization) as answer:
            found = re.search(r"\d+\.\d+\.\d+\w*", answer.read().decode())
    except (OSError, ValueError):
        return None
    return None if found is None else found[0]


def _ray(url: str) -> Endpoint:
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # Without one Ray refuses us, and that is what is told.
        with suppress(OSError):
            token = Path(path).read_text(encoding="utf-8").strip()
    headers = {"ours": f"Bearer {token}", "wrong": f"Bearer {WRONG}"}
    probe = f"{url}/api/version"

    def version() -> str | None:
        try:
            with ask(probe, headers["ours"]) as answer:
                return str(json.load(answer)["ray_version"])
        except (OSError, ValueError, KeyError):
            return None

    return Endpoint("Ray", url, lambda kind: status(probe, headers.get(kind)), "ray", version)


def _s3(place: str) -> Callable[[str], int | None]:
    bucket, _, prefix = place.removeprefix("s3://").partition("/")

    def answer(kind: str) -> int | None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        config = Config(s3={"addressing_style": "path"}, connect_timeout=5, retries={"total_max_attempts": 2})
        session = boto3.Session() if kind != "wrong" else boto3.Session("speck", WRONG, region_name="us-east-1")
        if kind == "none":
            config = config.merge(Config(signature_version=UNSIGNED))
        try:
            found = session.client("s3", config=config).list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except ClientError as error:
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        except BotoCoreError:
            return None
        return int(found["ResponseMetadata"]["HTTPStatusCode"])

    return answer

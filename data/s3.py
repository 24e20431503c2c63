"""A prefix of an S3 bucket as a folder; endpoint, region and credentials come from boto3's environment variables."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
)
from urllib3.exceptions import HTTPError

from data.archives import MAX_FILES, MAX_TOTAL_BYTES
from data.label_files import is_safe_name
from data.problems import ImportRefused

SCHEME = "s3://"
_NUM_THREADS = 8
_NUM_ATTEMPTS = 5
_CHUNK_BYTES = 2**20
_CONNECTIONS = {"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 16}
_REMEDY = "Check the address, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
FAILURES = (BotoCoreError, ClientError, HTTPError)


class ServerFailed(BotoCoreError):
    """The server's answer to a request is an error that cannot be read."""

    fmt = "{error}"


class BadEndpoint(BotoCoreError):
    """The endpoint is no address."""

    fmt = "{error}"


class Object(NamedTuple):
    """An object as it is listed: `name` is its key relative to the prefix."""

    key: str
    name: str
    size_bytes: int
    etag: str


class Incomplete(Exception):
    """Bytes that are not those the service says it has; worth another attempt."""


def connect(*, attempts: int = _NUM_ATTEMPTS, **options: str) -> Any:
    """Return a client of the service that boto3's environment variables name; boto3's `options` come before them.

    Nothing is sent yet. Raises a BotoCoreError when the endpoint or the profile cannot be.
    """
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    # A session of its own reads the environment anew. Path style: own servers have no name for every bucket.
    config = Config(**_CONNECTIONS, retries=retries, s3={"addressing_style": "path"})
    session = boto3.Session(profile_name=options.pop("profile_name", None))
    try:
        return session.client("s3", config=config, **options)
    except ValueError as error:
        raise BadEndpoint(error=error) from None


def is_refusal(error: Exception) -> bool:
    """Whether the service would refuse the same request again."""
    return isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] < 500


def is_final(error: Exception) -> bool:
    """Whether it is no use to ask again: refused, or nobody listened to any of the client's own attempts."""
    return is_refusal(error) or isinstance(error, EndpointConnectionError | ConnectTimeoutError)


def explain(error: Exception, client: Any) -> str:
    """Return which endpoint failed, why, and what to do about it; no credential is in it."""
    code = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
    if code == "RequestTimeTooSkewed":
        remedy = "Set this machine's clock: it is not the server's"
    elif code == "PreconditionFailed":
        remedy = "The object changed while it was read: do the same again"
    elif is_refusal(error) or isinstance(error, BadEndpoint | NoCredentialsError):
        remedy = _REMEDY
    else:
        remedy = "Check AWS_ENDPOINT_URL and that the server runs, then do the same again"
    endpoint = "" if client is None else f"{client.meta.endpoint_url}: "
    return re.sub(r"//[^/\s]*@", "//", f"{endpoint}{str(error).rstrip('.')}. {remedy}")


def download(url: str, target: Path) -> None:
    """Download all objects below `s3://bucket/prefix` into the new folder `target`, which a failure leaves half full.

    Every file has the size and, where it is an MD5, the ETag that the listing says; what is read is the version that
    was listed. Raises ImportRefused when there is nothing, an object's name would leave the target, or the service
    refuses or fails again and again.
    """
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise ImportRefused(f"{url!r}: an address is s3://bucket/prefix. Name a bucket")
    prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    target.mkdir(parents=True)
    client = None
    try:
        client = connect()
        objects = list(_listed(client, url, bucket, prefix))
        _check_room(url, objects, target)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            jobs = [pool.submit(_fetch, client, bucket, entry, target / entry.name) for entry in objects]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
    except (*FAILURES, Incomplete) as error:
        raise ImportRefused(f"{url!r}: {explain(error, client)}") from error


def _listed(client: Any, url: str, bucket: str, prefix: str) -> Iterator[Object]:
    is_empty = True
    for entry in objects_below(client, bucket, prefix):
        if not is_safe_name(entry.name):
            raise ImportRefused(f"{url!r}: the object {entry.key!r} would leave its folder. Rename it")
        is_empty = False
        yield entry
    if is_empty:
        raise ImportRefused(f"{url!r}: there is no object. {_REMEDY}")


def objects_below(client: Any, bucket: str, prefix: str) -> Iterator[Object]:
    """All objects below a prefix, which ends with a slash or is empty. Raises FAILURES."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            name = entry["Key"].removeprefix(prefix)
            if name and not name.endswith("/"):  # Markers of folders.
                yield Object(entry["Key"], name, entry["Size"], entry["ETag"])


def _check_room(url: str, objects: list[Object], target: Path) -> None:
    total_bytes, free_bytes = sum(entry.size_bytes for entry in objects), shutil.disk_usage(target).free
    if total_bytes > min(free_bytes, MAX_TOTAL_BYTES) or len(objects) > MAX_FILES:
        what = f"{len(objects)} objects of {total_bytes} bytes"
        rule = f"{what} are more than the {free_bytes} bytes that are free, or than any dataset has"
        raise ImportRefused(f"{url!r}: {rule}. Make room or name a smaller prefix")


def _fetch(client: Any, bucket: str, entry: Object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_NUM_ATTEMPTS):
        try:
            with path.open("wb") as file:
                receive(client, bucket, entry.key, file, etag=entry.etag)
            return
        except (*FAILURES, Incomplete) as error:
            # boto3 itself tries again only until the body begins.
            if attempt == _NUM_ATTEMPTS - 1 or is_final(error):
                raise
            time.sleep(0.1 * 2**attempt)


def receive(client: Any, bucket: str, key: str, sink: BinaryIO, *, etag: str = "") -> None:
    """Write an object's bytes to the sink, of the version with this ETag if one is given.

    Raises FAILURES; Incomplete when size or MD5 are not what the answer says.
    """
    response = get(client, bucket, key, **({"IfMatch": etag} if etag else {}))
    digest, size_bytes = hashlib.md5(usedforsecurity=False), 0
    while chunk := response["Body"].read(_CHUNK_BYTES):
        size_bytes += len(chunk)
        digest.update(chunk)
        sink.write(chunk)
    if size_bytes != response["ContentLength"]:
        raise Incomplete(f"{key!r} has {response['ContentLength']} bytes, {size_bytes} came")
    expected = md5_in(response)
    if expected is not None and expected != digest.hexdigest():
        raise Incomplete(f"{key!r} has the ETag {response['ETag']}, what came has {digest.hexdigest()}")


def get(client: Any, bucket: str, key: str, **conditions: str) -> dict[str, Any]:
    """The service's answer with an object. Raises FAILURES, among them ServerFailed."""
    try:
        answer: dict[str, Any] = client.get_object(Bucket=bucket, Key=key, **conditions)
    except AttributeError as error:
        # botocore stumbles over the answer to a GET that failed in the server.
        raise ServerFailed(error="the server failed, with an answer that cannot be read") from error
    return answer


def md5_in(response: Mapping[str, Any]) -> str | None:
    """The MD5 of an object's content where the answer to a request for it, or with it, holds that."""
    # With a key of one's own, or in several parts, the ETag is no MD5 of the content.
    is_md5 = re.fullmatch('"[0-9a-f]{32}"', response.get("ETag", "")) is not None
    is_md5 &= response.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in response
    return response["ETag"].strip('"') if is_md5 else None

"""The ledger on S3: `promotions/<dataset>/<generation>.json`, each an object that is written once.

The endpoint and credentials come from boto3's environment variables.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from tracking.authority import (
    AuthorityUnavailable,
    Entry,
    from_json,
    in_order,
    overtaken,
    require_next,
    to_json,
)

Answer = TypeVar("Answer")

_FAILURES = (BotoCoreError, ClientError, HTTPError)
_TAKEN, _CONFLICT = "PreconditionFailed", "ConditionalRequestConflict"
_NUM_THREADS = 8
_NUM_CONFLICTS = 5
_NUM_READS = 5


class S3Authority:
    """The ledger below `s3://bucket/prefix`; see `Authority`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._folder = f"{prefix}/promotions/" if prefix else "promotions/"
        self._is_conditional = False
        # Path style: servers of one's own have no name for every bucket.
        config = Config(
            connect_timeout=10,
            read_timeout=30,
            retries={"total_max_attempts": 5, "mode": "standard"},
            s3={"addressing_style": "path"},
        )
        try:
            # A session of its own reads the environment anew.
            self._client = boto3.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise AuthorityUnavailable(f"{url}: {_harmless(error)}. Check AWS_ENDPOINT_URL and AWS_PROFILE") from None

    def entries(self, dataset: str) -> list[Entry]:
        """See `Authority`."""
        keys = [self._key(dataset, generation) for generation in self._generations(dataset)]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            contents = pool.map(self._read, keys)
            read = [from_json(f"{self._bucket}/{key}", text) for key, text in zip(keys, contents, strict=True)]
        return in_order(f"{self._url}: {dataset}", read)

    def append(self, entry: Entry) -> None:
        """See `Authority`."""
        self._require_conditions()
        require_next(entry, max(self._generations(entry.dataset), default=0))
        # The id tells ours from an equal entry that somebody else wrote.
        content = to_json(entry, id=uuid.uuid4().hex).encode()
        key = self._key(entry.dataset, entry.generation)
        try:
            self._write_once(key, content)
        except _FAILURES as error:
            # The answer may have been lost, and a refusal may be that of our own repetition: what lies there decides.
            if self._read(key) == content:
                return
            if _code(error) == _TAKEN:
                raise overtaken(entry) from None
            raise self._unavailable(error) from error

    def _write_once(self, key: str, content: bytes) -> None:
        """Raises a ClientError with the code _TAKEN where an object lies there already."""
        for attempt in range(_NUM_CONFLICTS):
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=content, IfNoneMatch="*")
                return
            except ClientError as error:
                # Amazon S3 may refuse both of two writes at once, and asks to try again.
                if _code(error) != _CONFLICT or attempt == _NUM_CONFLICTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)

    def _require_conditions(self) -> None:
        """Raises AuthorityUnavailable where the server writes over what it was told to leave."""
        if self._is_conditional:
            return
        key = f"{self._folder}.probes/{uuid.uuid4().hex}"
        try:
            self._write_once(key, b"first")
            self._write_once(key, b"second")
        except _FAILURES as error:
            # Also where the first was repeated after a lost answer: the repetition was refused.
            if _code(error) != _TAKEN:
                raise self._unavailable(error) from error
            self._is_conditional = True
        finally:
            with suppress(*_FAILURES):
                self._client.delete_object(Bucket=self._bucket, Key=key)
        if not self._is_conditional:
            raise AuthorityUnavailable(
                f"{self._url}: the server at {_harmless(self._client.meta.endpoint_url)} ignores the condition "
                "'If-None-Match: *', so that of two promotions at once both would win. Nothing was decided. Use a "
                "server that honours it, as Amazon S3 does, or unset SPECK_STORAGE and share the folder SPECK_HOME"
            )

    def _generations(self, dataset: str) -> list[int]:
        """Those that were written, in order."""
        below = f"{self._folder}{dataset}/"

        def listed() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=below)
            return [entry["Key"].removeprefix(below) for page in pages for entry in page.get("Contents", ())]

        names = (re.fullmatch(r"([1-9][0-9]*)\.json", name) for name in self._asking(listed))
        return sorted(int(name[1]) for name in names if name is not None)

    def _read(self, key: str) -> bytes:
        """An object's content, empty where there is none."""

        def read() -> bytes:
            try:
                content: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            except AttributeError as error:
                # botocore stumbles over the answer to a GET that failed in the server.
                raise HTTPError("the server failed, with an answer that cannot be read") from error
            except ClientError as error:
                if _code(error) != "NoSuchKey":
                    raise
                return b""
            return content

        return self._asking(read)

    def _asking(self, read: Callable[[], Answer]) -> Answer:
        """What `read` returns; boto3 repeats a request by itself, but not the reading of an answer that breaks off."""
        for attempt in range(_NUM_READS):
            try:
                return read()
            except _FAILURES as error:
                if isinstance(error, ClientError) or attempt == _NUM_READS - 1:
                    raise self._unavailable(error) from error
                time.sleep(0.1 * 2**attempt)
        raise AssertionError

    def _unavailable(self, error: Exception) -> AuthorityUnavailable:
        return AuthorityUnavailable(
            f"{self._url}: {_harmless(error)}. Check AWS_ENDPOINT_URL, the credentials (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY) and the bucket, then do the same again"
        )

    def _key(self, dataset: str, generation: int) -> str:
        return f"{self._folder}{dataset}/{generation}.json"


def _code(error: Exception) -> str:
    code: str = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
    return code


def _harmless(error: object) -> str:
    """As text without the user and password of an address."""
    return re.sub(r"//[^/\s]*@", "//", str(error).rstrip("."))

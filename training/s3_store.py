"""One run's records below a prefix of an S3 bucket; endpoint and credentials come from boto3's environment variables.

Every write is compared with what the service says it took: size, and MD5 where it tells one. boto3 adds checksums of
its own where the service knows them.
"""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from data import s3
from data.label_files import is_safe_name
from data.objects import md5_of
from training.store import (
    MANIFEST,
    Answer,
    StorageDamaged,
    StorageFull,
    StorageUnavailable,
    Stored,
    files_to_upload,
    missing,
    repeated,
    require_name,
)

# What is larger goes in parts of this size, four at a time.
PART_BYTES = 16 * 2**20
_NUM_THREADS = 4
# Of an object whose bytes do not arrive as they were sent.
_NUM_COPIES = 3
_LOST = (ConnectionError, HTTPClientError, HTTPError, IncompleteReadError, s3.ServerFailed)
# Refusals that pass.
_BUSY = {
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "EntityQuotaExceeded"}


class S3Store:
    """Records below `s3://bucket/prefix`; see `open_store`."""

    def __init__(self, url: str, client: Any = None) -> None:
        self.url, self._client = url, client
        self._bucket, _, prefix = url.removeprefix(s3.SCHEME).partition("/")
        self._prefix = f"{prefix}/"
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=_NUM_THREADS,
            preferred_transfer_client="classic",
        )
        if client is None:
            try:
                self._client = s3.connect()
            except s3.FAILURES as error:
                raise self._unavailable("", error) from error

    def below(self, name: str) -> S3Store:
        """The records below `name/`, by the same client."""
        return S3Store(f"{self.url}/{require_name(name)}", self._client)

    def read(self, name: str) -> bytes:
        """See `RunStore`."""
        key = self._key(name)

        def read() -> bytes:
            content = io.BytesIO()
            s3.receive(self._client, self._bucket, key, content)
            return content.getvalue()

        return self._patiently(name, read)

    def write(self, name: str, content: bytes) -> None:
        """See `RunStore`."""
        key, md5 = self._key(name), hashlib.md5(content, usedforsecurity=False).hexdigest()

        def write() -> None:
            answer = self._client.put_object(Bucket=self._bucket, Key=key, Body=content)
            if s3.md5_in(answer) not in (None, md5):
                raise s3.Incomplete(f"{key!r} arrived with the ETag {answer['ETag']}, what was sent has {md5}")

        self._patiently(name, write)

    def exists(self, name: str) -> bool:
        """See `RunStore`."""
        key = self._key(name)
        # Not the request for the head alone, whose refusal has no body that says why.
        answer = self._patiently(name, lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=key, MaxKeys=1))
        return any(entry["Key"] == key for entry in answer.get("Contents", ()))

    def names(self, prefix: str = "") -> list[str]:
        """See `RunStore`."""
        return sorted(self.listing(prefix))

    def listing(self, prefix: str = "") -> dict[str, Stored]:
        """See `RunStore`."""
        return {
            entry.key.removeprefix(self._prefix): Stored(entry.size_bytes, entry.etag) for entry in self._below(prefix)
        }

    def upload(self, folder: Path, name: str, *, last: str) -> None:
        """See `RunStore`."""
        name = require_name(name)
        files = files_to_upload(folder, last)
        self.delete(name)
        try:
            for path in files:
                self._upload_file(path, f"{name}/{path.relative_to(folder).as_posix()}")
        except StorageFull:
            with suppress(StorageUnavailable):
                self.delete(name)
            raise

    def download(self, name: str, folder: Path) -> Path:
        """See `RunStore`."""
        entries = self._below(require_name(name))
        if not entries:
            raise missing(self.url, f"{name}/")
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            jobs = [pool.submit(self._fetch, entry, name, folder / entry.name) for entry in entries]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                for entry in entries:
                    (folder / entry.name).unlink(missing_ok=True)
                raise
        return folder

    def delete(self, name: str) -> None:
        """See `RunStore`. Parts of uploads that were killed go, too."""
        keys = [entry.key for entry in self._below(name)] + [self._key(name)] * self.exists(name)
        for key in sorted(keys, key=lambda key: PurePosixPath(key).name != MANIFEST):
            self._patiently(name, lambda key=key: self._client.delete_object(Bucket=self._bucket, Key=key))  # type: ignore[misc]
        self._abort_uploads(name)

    def _key(self, name: str) -> str:
        return f"{self._prefix}{require_name(name)}"

    def _below(self, prefix: str) -> list[s3.Object]:
        start = f"{self._key(prefix)}/" if prefix else self._prefix
        entries = self._patiently(prefix, lambda: list(s3.objects_below(self._client, self._bucket, start)))
        for entry in entries:
            if not is_safe_name(entry.name):
                raise StorageDamaged(f"{self.url}: the object {entry.key!r} would leave its folder. Delete it")
        return entries

    def _fetch(self, entry: s3.Object, name: str, path: Path) -> None:
        def fetch() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                s3.receive(self._client, self._bucket, entry.key, file, etag=entry.etag)

        try:
            self._patiently(f"{name}/{entry.name}", fetch, entry.size_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"{path}: no room on this node for {self.url}/{name}. Free some space") from error
            raise

    def _upload_file(self, path: Path, name: str) -> None:
        key, size_bytes = self._key(name), path.stat().st_size

        def upload() -> None:
            with path.open("rb") as file:
                self._client.upload_fileobj(file, self._bucket, key, Config=self._transfer)
            head = self._client.head_object(Bucket=self._bucket, Key=key)
            if head["ContentLength"] != size_bytes:
                raise s3.Incomplete(f"{key!r} arrived with {head['ContentLength']} bytes of {size_bytes}")
            md5 = s3.md5_in(head)
            if md5 is not None and md5 != md5_of(path):
                raise s3.Incomplete(f"{key!r} arrived with the ETag {head['ETag']}, what was sent has {md5_of(path)}")

        self._patiently(name, upload, size_bytes)

    def _abort_uploads(self, name: str) -> None:
        # A service that knows no such list, or shows it to nobody, cleans up by its own rules.
        with suppress(StorageUnavailable):
            key = self._key(name)
            answer = self._patiently(name, lambda: self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=key))
            for upload in answer.get("Uploads", ()):
                if upload["Key"] == key or upload["Key"].startswith(f"{key}/"):
                    where = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._patiently(name, lambda where=where: self._client.abort_multipart_upload(**where))  # type: ignore[misc]

    def _patiently(self, name: str, call: Callable[[], Answer], num_bytes: int = 0) -> Answer:
        num_damaged = 0

        def passes(error: Exception) -> bool:
            nonlocal num_damaged
            if isinstance(error, s3.Incomplete):
                num_damaged += 1
                return num_damaged < _NUM_COPIES
            return _passes(error)

        try:
            return repeated(call, passes, num_bytes)
        except (*s3.FAILURES, s3.Incomplete) as error:
            if isinstance(error, ClientError) and _code(error) == "NoSuchKey":
                raise missing(self.url, name) from None
            raise self._unavailable(name, error) from error

    def _unavailable(self, name: str, error: Exception) -> StorageUnavailable:
        kind = StorageUnavailable
        if _is_full(error):
            kind = StorageFull
        elif isinstance(error, s3.Incomplete):
            kind = StorageDamaged
        return kind(f"{self.url}/{name}: {s3.explain(error, self._client)}")


def _code(error: ClientError) -> str:
    details: Mapping[str, str] = error.response.get("Error", {})
    return details.get("Code", "")


def _is_full(error: Exception) -> bool:
    if not isinstance(error, ClientError):
        return False
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status == 507 or _code(error) in _FULL or "no space left on device" in str(error)


def _passes(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _code(error) in _BUSY or not (s3.is_refusal(error) or _is_full(error))
    return isinstance(error, _LOST)

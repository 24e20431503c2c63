"""An HTTP server that remembers what a bucket is told to be, which no S3 server of the tests does.

What S3 is sent about a bucket (`PUT ?versioning`) and what it tells of it (`GET ?versioning`) are the same document.
Of a policy it obeys the one statement that a check can see at work: nothing below `promotions/` is deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from services.loopback import Handler, serving_by

SETTINGS = {"policy", "versioning", "encryption", "lifecycle", "publicAccessBlock"}


class Memory(Handler):
    """`documents` by setting, `objects` by path; the bucket is there as soon as it was asked for."""

    documents: dict[str, bytes]
    objects: dict[str, bytes]
    buckets: set[str]

    def do_PUT(self) -> None:
        """A bucket, a setting or an object."""
        url, body = urlsplit(self.path), self.body()
        if (setting := url.query.rstrip("=")) in SETTINGS:
            self.documents[setting] = body
        elif url.path.count("/") == 1 or url.path.endswith("/"):
            self.buckets.add(url.path.strip("/"))
        elif self.headers.get("If-None-Match") == "*" and url.path in self.objects:
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self.objects[url.path] = body
        return self.answer(200)

    def do_GET(self) -> None:
        """A setting."""
        setting = urlsplit(self.path).query.rstrip("=")
        if setting in self.documents:
            self.answer(200, self.documents[setting])
        elif setting == "versioning":
            self.answer(200, b"<VersioningConfiguration/>")
        else:
            code = {
                "policy": "NoSuchBucketPolicy",
                "lifecycle": "NoSuchLifecycleConfiguration",
                "encryption": "ServerSideEncryptionConfigurationNotFoundError",
                "publicAccessBlock": "NoSuchPublicAccessBlockConfiguration",
            }[setting]
            self.answer(404, f"<Error><Code>{code}</Code></Error>".encode())

    def do_HEAD(self) -> None:
        """A bucket."""
        self.answer(200 if urlsplit(self.path).path.strip("/") in self.buckets else 404)

    def do_DELETE(self) -> None:
        """An object."""
        if "/promotions/" in self.path and b"s3:DeleteObject" in self.documents.get("policy", b""):
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        self.objects.pop(urlsplit(self.path).path, None)
        return self.answer(204)


@contextmanager
def remembering_s3() -> Iterator[tuple[str, type[Memory]]]:
    """Its address, and what it knows."""
    knows = type("Knows", (Memory,), {"documents": {}, "objects": {}, "buckets": set()})
    with serving_by(knows) as url:
        yield url, knows

"""`data.s3` through boto3 itself, against a small server that lists in pages and can be told to misbehave."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from services.loopback import Handler, serving

from data import s3
from data.importing import ImportRefused, register
from data.objects import S3Objects, SourceUnavailable
from data.prepare import prepare

Make = Callable[..., Path]
PAGE = 3


class Bucket(ThreadingHTTPServer):
    """One bucket, `drone`. `faults`: key -> how many of its downloads go wrong, and how."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.faults: dict[str, tuple[int, str]] = {}
        self.requests: Counter[str] = Counter()
        self.slept_s: list[float] = []

    def etag(self, key: str) -> str:
        return self.etags.get(key, f'"{hashlib.md5(self.objects[key]).hexdigest()}"')


class _Handler(Handler):
    server: Bucket

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        server = self.server
        server.requests[key or "list"] += 1
        if "Credential=late/" in self.headers.get("Authorization", ""):
            self.error(403, "RequestTimeTooSkewed")
        elif "Credential=wrong/" in self.headers.get("Authorization", ""):
            self.error(403, "InvalidAccessKeyId")
        elif bucket != "drone":
            self.error(404, "NoSuchBucket")
        elif not key:
            self.listing({name: values[0] for name, values in parse_qs(parts.query).items()})
        elif self.headers.get("If-Match") != server.etag(key):
            self.error(412, "PreconditionFailed")
        else:
            self.object(key)

    def listing(self, query: dict[str, str]) -> None:
        keys = sorted(key for key in self.server.objects if key.startswith(query.get("prefix", "")))
        start = int(query.get("continuation-token", "0"))
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            f"<ETag>{escape(self.server.etag(key))}</ETag></Contents>"
            for key in keys[start : start + PAGE]
        )
        more = start + PAGE < len(keys)
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        body = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>"
        self.answer(200, body.encode())

    def object(self, key: str) -> None:
        body, (left, fault) = self.server.objects[key], self.server.faults.get(key, (0, ""))
        if left:
            self.server.faults[key] = (left - 1, fault)
        if left and fault == "busy":
            self.error(503, "SlowDown")
        elif left and fault == "cut":
            self.close_connection = True
            self.answer(200, body[: len(body) // 2], length=str(len(body)), ETag=self.server.etag(key))
        elif left and fault == "flipped":
            self.answer(200, bytes([body[0] ^ 1]) + body[1:], ETag=self.server.etag(key))
        else:
            self.answer(200, body, ETag=self.server.etag(key))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr("time.sleep", server.slept_s.append)
    with serving(server):
        yield server


def fill(bucket: Bucket, folder: Path, prefix: str) -> None:
    bucket.objects |= {
        f"{prefix}{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("url", ["s3://drone/sets/harbour", "s3://drone/sets/harbour/"])
def test_a_prefix_is_imported_as_a_copy(bucket: Bucket, coco_folder: Make, make_repo: Make, url: str) -> None:
    source, repo = coco_folder(), make_repo()
    fill(bucket, source, "sets/harbour/")
    bucket.objects |= {"sets/harbour/": b"", "sets/harbour/images/": b"", "sets/harbour-2/x.png": b"other"}
    register("harbour", url, repo=repo)
    assert tree(repo / "data/raw/harbour") == tree(source)
    assert {path.name for path in (repo / "data/raw").iterdir()} == {"harbour"}
    assert bucket.requests["list"] > 3, "page by page"
    assert prepare("harbour", repo).is_dir()


def test_faults_of_the_labels_are_told_of_the_address(bucket: Bucket, coco_folder: Make, make_repo: Make) -> None:
    source = coco_folder()
    (source / "annotations/val.json").write_text("")
    fill(bucket, source, "sets/harbour/")
    with pytest.raises(ImportRefused) as caught:
        register("harbour", "s3://drone/sets/", "coco", repo=make_repo())
    assert str(caught.value).startswith("s3://drone/sets/harbour/annotations/val.json:1:1: error: ")
    assert ".partial" not in str(caught.value)


@pytest.mark.parametrize("fault", ["busy", "cut", "flipped"])
def test_faults_that_pass_are_tried_again(bucket: Bucket, tmp_path: Path, fault: str) -> None:
    bucket.objects = {f"a/{number}.txt": bytes([number]) * 1000 for number in range(5)}
    bucket.faults = {"a/1.txt": (2, fault), "a/3.txt": (1, fault)}
    s3.download("s3://drone/a", tmp_path / "target")
    assert tree(tmp_path / "target") == {f"{number}.txt": bytes([number]) * 1000 for number in range(5)}


@pytest.mark.parametrize("fault", ["busy", "cut", "flipped"])
def test_faults_that_stay_are_an_error_and_leave_nothing(
    bucket: Bucket, coco_folder: Make, make_repo: Make, fault: str
) -> None:
    source, repo = coco_folder(), make_repo()
    fill(bucket, source, "a/")
    bucket.faults = {"a/annotations/val.json": (10**6, fault)}
    with pytest.raises(ImportRefused, match=r"s3://drone/a'.* Check AWS_ENDPOINT_URL and that the server runs, then"):
        register("harbour", "s3://drone/a", repo=repo)
    assert bucket.requests["a/annotations/val.json"] <= 25, "bounded"
    assert [seconds for seconds in bucket.slept_s if seconds] == [0.1, 0.2, 0.4, 0.8], "longer each time"
    assert [*(repo / "data/raw").iterdir(), *(repo / "data/catalog").iterdir()] == []


def test_an_object_that_changes_meanwhile_is_an_error(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects = {"a/1.txt": b"new"}
    listed = s3._listed

    def changing(*arguments: object) -> Iterator[object]:
        yield from listed(*arguments)  # type: ignore[arg-type]
        bucket.objects["a/1.txt"] = b"old"

    monkeypatch.setattr(s3, "_listed", changing)
    with pytest.raises(ImportRefused, match=r"PreconditionFailed.* changed while it was read: do the same"):
        s3.download("s3://drone/a", tmp_path / "target")


def test_an_etag_of_several_parts_is_no_md5(bucket: Bucket, tmp_path: Path) -> None:
    bucket.objects, bucket.etags = {"a/1.txt": b"new"}, {"a/1.txt": f'"{"0" * 32}-3"'}
    s3.download("s3://drone/a", tmp_path / "target")
    assert tree(tmp_path / "target") == {"1.txt": b"new"}


@pytest.mark.parametrize("key", ["a/../../b", "a//etc/passwd", "a/b\\c", "a/b\x07"])
def test_names_that_leave_the_folder_are_refused(bucket: Bucket, tmp_path: Path, key: str) -> None:
    bucket.objects = {key: b"x"} if "\x07" not in key else {"a/b\x85": b"x"}
    with pytest.raises(ImportRefused, match=r"would leave its folder\. Rename it"):
        s3.download("s3://drone/a", tmp_path / "target")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("s3://", "Name a bucket"),
        ("s3:///a", "Name a bucket"),
        ("s3://drone/nothing", "there is no object"),
        ("s3://other/a", "NoSuchBucket"),
    ],
)
def test_addresses_without_data(bucket: Bucket, tmp_path: Path, url: str, rule: str) -> None:
    with pytest.raises(ImportRefused, match=rule):
        s3.download(url, tmp_path / "target")


def test_wrong_credentials_and_a_server_that_is_gone(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.objects = {"a/1.txt": b"new"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(ImportRefused, match="InvalidAccessKeyId") as caught:
        s3.download("s3://drone/a", tmp_path / "target")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ImportRefused, match="Could not connect"):
        s3.download("s3://drone/a", tmp_path / "gone")


def test_a_clock_that_is_wrong_is_said(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.objects = {"a/1.txt": b"new"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "late")
    with pytest.raises(ImportRefused, match=r"RequestTimeTooSkewed.* Set this machine's clock") as caught:
        s3.download("s3://drone/a", tmp_path / "target")
    assert "credentials" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://user:p4ssw0rd@127.0.0.1:1", "http://user:p4@ssw0rd@127.0.0.1:1", "user"])
def test_an_endpoint_s_password_is_not_told(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ImportRefused, match=r"s3://drone/a'.*AWS_ENDPOINT_URL") as caught:
        s3.download("s3://drone/a", tmp_path / "target")
    assert "p4" not in str(caught.value)
    assert "ssw0rd" not in str(caught.value)


def test_more_than_the_disk_has(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.objects = {"a/1.txt": b"12345"}
    monkeypatch.setattr(s3, "MAX_TOTAL_BYTES", 4)
    with pytest.raises(ImportRefused, match="1 objects of 5 bytes are more than"):
        s3.download("s3://drone/a", tmp_path / "target")
    assert bucket.requests == {"list": 1}


def test_an_answer_that_botocore_stumbles_over_is_the_servers_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GET that failed in the server: its body is taken for text."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objects = S3Objects("s3://bucket/prefix", aws_access_key_id="a", aws_secret_access_key="b", region_name="c")

    def stumble(**_: str) -> None:
        raise AttributeError("'StreamingChecksumBody' object has no attribute 'strip'")

    monkeypatch.setattr(objects._client, "get_object", stumble)
    monkeypatch.setattr("data.objects.time.sleep", lambda _: None)
    with pytest.raises(SourceUnavailable, match="the server failed, with an answer that cannot be read"):
        objects.read("0" * 32)

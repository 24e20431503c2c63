"""The door before a real rclone: who bears no signature is refused as Amazon's S3 would, all else passes untouched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from io import BytesIO
from pathlib import Path
from socket import SHUT_WR
from typing import Any, NamedTuple

import boto3
import psutil
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from chaos.processes import wait_until
from services.s3_server import RCLONE, WITHOUT_RCLONE, wait_for_answer

from infra.processes import still_alive
from infra.s3_door import PIECE_BYTES, is_signed
from infra.servers import free_port

pytestmark = pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)


class Door(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]

    def client(self, secret: str = "right") -> Any:
        return boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id="speck", aws_secret_access_key=secret,
            region_name="us-east-1", config=Config(retries={"total_max_attempts": 1}),
        )  # fmt: skip


@contextmanager
def opened(folder: Path) -> Iterator[Door]:
    port, served_at, log = free_port(), folder / "s3.sock", folder / "log"
    (folder / "served" / "bucket").mkdir(parents=True)
    # What a killed one left behind must not keep the next from starting.
    served_at.touch()
    serve = [str(RCLONE), "serve", "s3", "--addr", f"unix://{served_at}", "--vfs-cache-mode", "off", "--config", ""]
    command = [sys.executable, "-m", "infra.s3_door", str(port), str(served_at), *serve, str(folder / "served")]
    environment = os.environ | {"RCLONE_AUTH_KEY": '"speck,right"'}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            wait_for_answer(f"http://127.0.0.1:{port}", process, log)
            wait_until(served_at.is_socket, 10, "rclone", every_s=0.05)
            yield Door(f"http://127.0.0.1:{port}", process)
        finally:
            for one in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
                one.terminate()


def connected(door: Door) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2])), timeout=10)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with opened(tmp_path_factory.mktemp("door")) as door:
        yield door


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
@pytest.mark.parametrize("authorization", [None, "", "Basic c3BlY2s6cmlnaHQ=", "Bearer x"])
def test_a_request_without_a_signature_is_refused_with_403(door: Door, method: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    request = urllib.request.Request(f"{door.url}/bucket/key", method=method, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=5)
    body = raised.value.read()
    assert (raised.value.code, b"<Code>AccessDenied</Code>" in body) == (403, method != "HEAD")
    # `speck doctor` compares clocks by it.
    assert abs(datetime.now(UTC) - parsedate_to_datetime(raised.value.headers["Date"])) < timedelta(minutes=1)


def test_whoever_sends_much_without_a_signature_reads_the_refusal(door: Door) -> None:
    for _ in range(5):
        request = urllib.request.Request(f"{door.url}/bucket/key", b"x" * (5 << 20), method="PUT")
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=10)
        assert raised.value.code == 403


def test_a_head_without_end_is_too_large(door: Door) -> None:
    with connected(door) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"x" * (2 * PIECE_BYTES))
        client.shutdown(SHUT_WR)
        assert client.makefile("rb").readline().startswith(b"HTTP/1.1 431 ")


def test_a_connection_that_rclone_gives_up_is_closed_though_the_client_is_idle(door: Door) -> None:
    own = psutil.Process(door.process.pid)
    before = own.num_fds()
    request = AWSRequest("GET", f"{door.url}/bucket?list-type=2")
    request.headers["Connection"] = "close"
    S3SigV4Auth(Credentials("speck", "right"), "s3", "us-east-1").add_auth(request)
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    head = "\r\n".join(
        ["GET /bucket?list-type=2 HTTP/1.1", f"Host: {door.url.removeprefix('http://')}", *lines, "", ""]
    )
    with connected(door) as client:
        client.sendall(head.encode())
        assert client.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        wait_until(lambda: own.num_fds() <= before, 10, "the end of the connection", every_s=0.05)


def test_a_wrong_signature_is_refused_by_rclone(door: Door) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch") as raised:
        door.client("wrong").list_objects_v2(Bucket="bucket")
    assert raised.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_objects_pass_untouched_also_in_parts_and_many_at_once(door: Door) -> None:
    client = door.client()
    large = os.urandom(20 << 20)
    client.upload_fileobj(BytesIO(large), "bucket", "large")
    back = BytesIO()
    client.download_fileobj("bucket", "large", back)
    assert back.getvalue() == large
    small = {f"{number:03}": os.urandom(number * 100) for number in range(100)}
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda item: client.put_object(Bucket="bucket", Key=item[0], Body=item[1]), small.items()))
        read = dict(
            threads.map(lambda key: (key, client.get_object(Bucket="bucket", Key=key)["Body"].read()), sorted(small))
        )
    assert read == small


def test_the_door_ends_with_rclone(tmp_path: Path) -> None:
    with opened(tmp_path) as door, connected(door):
        (rclone,) = psutil.Process(door.process.pid).children()
        rclone.kill()
        assert door.process.wait(10) != 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_rclone_ends_with_the_door(tmp_path: Path) -> None:
    with opened(tmp_path) as door:
        (rclone,) = psutil.Process(door.process.pid).children()
        door.process.terminate()
        assert still_alive([rclone, psutil.Process(door.process.pid)], 10) == []


def test_a_signed_link_bears_its_signature_in_the_address() -> None:
    host = b"Host: 127.0.0.1\r\n\r\n"
    assert is_signed(b"GET /b/k?X-Amz-Expires=60&X-Amz-Signature=0f HTTP/1.1\r\n" + host)
    assert is_signed(b"GET / HTTP/1.1\r\nauthorization:\tAWS4-HMAC-SHA256 Credential=x\r\n" + host)
    assert not is_signed(b"GET /b/k?prefix=authorization: HTTP/1.1\r\n" + host)

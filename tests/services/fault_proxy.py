"""An HTTP proxy on loopback that passes requests on to a server on this machine, and fails as it is told."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from services.loopback import Handler, serving

SKEWED = (
    b'<?xml version="1.0"?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request time '
    b"and the server's time is too large.</Message></Error>"
)

# As MinIO says it.
FULL = (
    b'<?xml version="1.0"?><Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free '
    b"drive threshold. Please delete a few objects to proceed.</Message></Error>"
)


class FaultProxy:
    """Counts requests by method and path, and the faults that it made.

    `failing_share` of all requests are refused with 503, have their connection cut, or lose half of their answer;
    `is_skewed` refuses all of them for their clock, `is_full` those that bring something; `delay_s` passes before every
    answer; `damaged` is how often answers whose path ends so get one byte flipped.
    """

    def __init__(self, target_port: int) -> None:
        self.failing_share = 0.0
        self.is_skewed = self.is_full = False
        self.delay_s = 0.0
        self.damaged: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.num_faults = 0
        self._random, self._lock = random.Random(0), threading.Lock()
        proxy = self

        class Proxying(Handler):
            def handle_one_request(self) -> None:
                with suppress(ConnectionError):
                    super().handle_one_request()

            def do_GET(self) -> None:
                proxy._answer(self, target_port)

            do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Proxying)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, target_port: int) -> None:
        body = _body(request)
        path = request.path.partition("?")[0]
        with self._lock:
            self.requests[request.command, path] += 1
            is_failing = self._random.random() < self.failing_share
            self.num_faults += is_failing
            fault = self._random.choice(("refuse", "cut", "halve")) if is_failing else ""
            ending = next((end for end in self.damaged if self.damaged[end] and path.endswith(end)), None)
            if ending is not None and request.command == "GET":
                self.damaged[ending] -= 1
        time.sleep(self.delay_s)
        if self.is_skewed:
            _send(request, 403, {"Content-Type": "application/xml"}, SKEWED)
            return
        if self.is_full and request.command in {"PUT", "POST"}:
            _send(request, 507, {"Content-Type": "application/xml"}, FULL)
            return
        if fault == "refuse":
            _send(request, 503, {}, b"")
            return
        if fault == "cut":
            request.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
        # The Host header is signed, so all headers go as they came.
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() not in {"transfer-encoding", "expect"}:
                connection.putheader(name, value)
        if request.headers.get("Transfer-Encoding"):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        content, headers = bytearray(answer.read()), dict(answer.getheaders())
        if ending is not None and content and request.command == "GET":
            content[len(content) // 2] ^= 1
            # Not every server sends a checksum, with which the client would find the damage itself.
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
        _send(request, answer.status, headers, bytes(content), is_halved=fault == "halve")
        connection.close()


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    content = b""
    while size := int(request.rfile.readline().split(b";")[0], 16):
        content += request.rfile.read(size)
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return content


def _send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, *, is_halved: bool = False
) -> None:
    request.send_response_only(status)
    for name, value in headers.items():
        if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
            request.send_header(name, value)
    if status != 204:
        length = headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(content))
        request.send_header("Content-Length", length)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content[: len(content) // 2] if is_halved else content)
    if is_halved:
        request.close_connection = True


@contextmanager
def fault_proxy(target_port: int) -> Iterator[FaultProxy]:
    """A proxy that lives as long as this block."""
    made = FaultProxy(target_port)
    with serving(made.server):
        yield made

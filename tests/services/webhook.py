"""A receiver of webhooks on loopback, for the length of a `with` block."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "canary-of-the-webhook"


@dataclass(frozen=True)
class Receiver:
    """`url` holds a secret, as those of chat rooms do; `received` grows: path and JSON of every POST."""

    url: str
    received: list[tuple[str, Any]] = field(default_factory=list)

    def told(self, what: str) -> list[Any]:
        """The notifications of one kind, all sent to the right address."""
        assert all(path == f"/hook/{SECRET}" for path, _ in self.received)
        return [told for _, told in list(self.received) if told["what"] == what]


@contextmanager
def webhook_receiver() -> Iterator[Receiver]:
    received: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Receiver(f"http://127.0.0.1:{server.server_port}/hook/{SECRET}", received)
        server.shutdown()

"""A receiver of webhooks on loopback, for the length of a `with` block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.loopback import Handler, serving_by

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

    class Receiving(Handler):
        def do_POST(self) -> None:
            received.append((self.path, json.loads(self.body())))
            self.answer(200)

    with serving_by(Receiving) as url:
        yield Receiver(f"{url}/hook/{SECRET}", received)

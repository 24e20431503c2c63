"""What `speck down` asks of Ray's head, with the head's API as its answers say it; the soak tier has a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from services.loopback import Handler, serving

from infra import stack as module
from infra import stack_lifecycle
from infra.servers import HOST
from infra.stack import Stack, settle
from infra.stack_lifecycle import stop_jobs


class Head(ThreadingHTTPServer):
    """Jobs by id: what Ray's list says of each. Those in `stubborn` do not end when they are asked to."""

    def __init__(self) -> None:
        super().__init__((HOST, 0), Answers)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stubborn: set[str] = set()
        self.asked: list[str] = []

    def add(self, name: str, *, end_time: int | None = None) -> None:
        self.jobs[name] = {"submission_id": name, "type": "SUBMISSION", "end_time": end_time}


class Answers(Handler):
    server: Head

    def do_GET(self) -> None:
        # A process that connected by itself is no job that could be stopped.
        driver = {"submission_id": None, "type": "DRIVER", "end_time": None}
        self._answer([*self.server.jobs.values(), driver])

    def do_POST(self) -> None:
        self.body()
        *_, name, verb = self.path.split("/")
        assert verb == "stop"
        self.server.asked.append(name)
        if name not in self.server.stubborn:
            self.server.jobs[name]["end_time"] = 1
        self._answer({"stopped": True})

    def _answer(self, content: object) -> None:
        assert self.headers["Authorization"] == "Bearer a token"
        self.answer(200, json.dumps(content).encode())


@pytest.fixture
def head() -> Iterator[Head]:
    with serving(Head()) as server:
        yield server


@pytest.fixture
def stack(tmp_path: Path, head: Head, monkeypatch: pytest.MonkeyPatch) -> Stack:
    monkeypatch.setattr(module, "postgres_folder", lambda: None)
    made = settle(tmp_path / "home", tmp_path)
    made.token_file.write_text("a token\n")
    made.ports["ray-dashboard"] = head.server_port
    return made


def test_all_that_run_are_asked_once_and_waited_for(stack: Stack, head: Head) -> None:
    head.add("aaa-1")
    head.add("bbb-1", end_time=7)
    head.add("ccc-2")
    said: list[str] = []
    stop_jobs(stack, said.append)
    assert head.asked == ["aaa-1", "ccc-2"]
    assert said == [f"Ray job {name} is asked to keep a checkpoint and stop" for name in ("aaa-1", "ccc-2")]
    stop_jobs(stack, said.append)
    assert len(said) == 2, "nothing runs any more"


def test_one_that_does_not_end_is_named_and_holds_nothing_up(
    stack: Stack, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_lifecycle, "JOBS_STOP_S", 0.2)
    head.add("bbb-1")
    head.stubborn.add("bbb-1")
    said: list[str] = []
    stop_jobs(stack, said.append)
    assert said[-1] == "these jobs have not stopped: bbb-1; what follows their newest checkpoint is lost"
    assert head.asked == ["bbb-1"]


def test_without_a_head_that_is_said(stack: Stack, head: Head) -> None:
    head.shutdown()
    head.server_close()
    said: list[str] = []
    stop_jobs(stack, said.append)
    (line,) = said
    assert line.startswith("Ray did not say whether its jobs have stopped")

"""Processes that ended and that nobody asks for, as in a container whose first process does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from chaos.processes import new_mark

from infra.processes import is_alive, kill_marked, marked, still_alive
from infra.stack import MARK


@pytest.fixture
def mark() -> str:
    """No other test's."""
    return f"{new_mark()}:"


@pytest.fixture
def sleeper(mark: str) -> Iterator[psutil.Process]:
    """A marked process, which is not waited for within the test."""
    command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(600)"]
    with subprocess.Popen(command, env={**os.environ, MARK: f"{mark}s3"}, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def test_who_ended_is_not_waited_for(sleeper: psutil.Process, mark: str) -> None:
    assert is_alive(sleeper)
    assert still_alive([sleeper], 0.1) == [sleeper]
    assert marked(mark) == [sleeper]
    assert marked(f"{mark}postgres") == []
    assert kill_marked(mark, 60) == []
    assert sleeper.status() == psutil.STATUS_ZOMBIE
    assert not is_alive(sleeper)
    assert marked(mark) == []


def test_who_does_not_end_is_told(sleeper: psutil.Process) -> None:
    sleeper.suspend()
    assert still_alive([sleeper], 0.1) == [sleeper]
    os.kill(sleeper.pid, signal.SIGKILL)
    assert still_alive([sleeper], 60) == []

"""Leases between threads and real processes that share a folder."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos.processes import wait_until

import flows.lease
from flows.lease import LeaseLost, lease

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from flows.lease import lease
with lease(Path(sys.argv[1]), "abc", print, lambda: None):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(flows.lease, "POLL_S", 0.02)
    return tmp_path / "runs"


def never() -> None:
    """A flow that nobody stops."""


def path_of(storage: Path) -> Path:
    return storage.parent / "leases" / "abc.json"


@pytest.fixture
def holder(storage: Path) -> Callable[[], subprocess.Popen[str]]:
    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(storage)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    return start


def test_one_of_many_threads_at_a_time(storage: Path) -> None:
    inside, most, total = 0, 0, 0
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most, total
        with lease(storage, "abc", lambda _: None, never):
            with count:
                inside, total = inside + 1, total + 1
                most = max(most, inside)
            time.sleep(0.01)
            with count:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, total) == (1, 6)
    assert list(path_of(storage).parent.glob("*.json")) == []


def test_a_living_process_is_waited_for_by_name_and_its_end_ends_the_wait(
    storage: Path, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    with holder() as process:
        said: list[str] = []
        assert process.stdin is not None
        threading.Timer(1.0, process.stdin.close).start()
        with lease(storage, "abc", said.append, never):
            assert process.wait(10) == 0
        assert said == [f"waiting: process {process.pid} on {platform.node()} is at work on abc"]


def test_the_lease_of_a_killed_process_is_taken_over_at_once(
    storage: Path, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    with holder() as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        said: list[str] = []
        with lease(storage, "abc", said.append, never):
            assert json.loads(path_of(storage).read_bytes())["pid"] == os.getpid()
        assert said == []


def test_a_stop_ends_the_wait(storage: Path) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with lease(storage, "abc", print, never):
        with pytest.raises(KeyboardInterrupt), lease(storage, "abc", print, stopped):
            raise AssertionError("two holders")
        assert path_of(storage).exists()


def test_what_another_machine_does_not_renew_expires_and_its_late_holder_learns_of_it(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.lease, "EXPIRES_AFTER_S", 1.0)
    monkeypatch.setattr(flows.lease, "RENEW_EVERY_S", 0.1)
    path_of(storage).parent.mkdir()
    path_of(storage).write_text(json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "process_started": 0.0}))
    waited = time.monotonic()
    with lease(storage, "abc", lambda _: None, never) as held:
        assert time.monotonic() - waited > 1.0
        wait_until(lambda: json.loads(path_of(storage).read_bytes())["renewals"] > 5, 60, "not renewed")
        held.check()
        renewed = json.loads(path_of(storage).read_bytes())

        def is_lost() -> bool:
            # A renewal that was under way may write over it once.
            path_of(storage).write_text(json.dumps({**renewed, "owner": "another"}))
            try:
                held.check()
            except LeaseLost:
                return True
            return False

        wait_until(is_lost, 60, "the late holder did not learn of it", every_s=0.2)
    assert json.loads(path_of(storage).read_bytes())["owner"] == "another"


@pytest.mark.parametrize("damage", ["", "[1]", '{"owner": '])
def test_a_damaged_lease_is_nobodys_and_expires(storage: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(flows.lease, "EXPIRES_AFTER_S", 0.5)
    path_of(storage).parent.mkdir()
    path_of(storage).write_text(damage)
    with lease(storage, "abc", lambda _: None, never):
        assert json.loads(path_of(storage).read_bytes())["pid"] == os.getpid()


def test_many_that_wait_for_a_dead_holder_still_come_one_at_a_time(storage: Path) -> None:
    path_of(storage).parent.mkdir()
    inside, most = 0, 0
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with lease(storage, "abc", lambda _: None, never) as held:
            with count:
                inside += 1
                most = max(most, inside)
            time.sleep(0.005)
            held.check()
            with count:
                inside -= 1

    for _ in range(5):
        gone = {"owner": "x", "host": platform.node(), "pid": 2**22 + 1, "process_started": 0.0}
        path_of(storage).write_text(json.dumps(gone))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1

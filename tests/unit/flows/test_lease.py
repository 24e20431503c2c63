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

import psutil
import pytest
from chaos.processes import wait_until

import flows.lease
from flows.lease import Busy, LeaseLost, _place, dead_leases, lease
from training.checkpoint import write_json

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
            assert process.wait(300) == 0
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
        gone = {"owner": "x", "host": platform.node(), "place": _place(), "pid": 2**22 + 1, "process_started": "0"}
        path_of(storage).write_text(json.dumps(gone))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_who_has_no_patience_is_told_who_is_at_work(storage: Path, holder: Callable[[], subprocess.Popen[str]]) -> None:
    process = holder()
    with pytest.raises(Busy) as caught, lease(storage, "abc", print, never, patient=False):
        pass
    assert (caught.value.holder["pid"], caught.value.holder["host"]) == (process.pid, platform.node())
    process.kill()
    process.wait()
    with lease(storage, "abc", print, never, patient=False, about={"flow_run": "mine"}) as held:
        assert held.dead is not None
        assert held.dead["pid"] == process.pid
        assert json.loads(path_of(storage).read_bytes())["flow_run"] == "mine"
    with lease(storage, "abc", print, never, patient=False) as held:
        assert held.dead is None


def test_a_living_process_of_a_container_with_this_machine_s_name_keeps_its_lease(storage: Path) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this account may not make a process namespace")
    holder = f"import flows.lease\nflows.lease.RENEW_EVERY_S = 0.2\n{HOLDER}"
    command = [*unshare, sys.executable, "-c", holder, str(storage)]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        content = json.loads(path_of(storage).read_bytes())
        assert (content["host"], content["pid"]) == (platform.node(), 1)
        assert dead_leases(storage) == []
        with pytest.raises(Busy), lease(storage, "abc", print, never, patient=False):
            pass
        process.kill()


def test_a_killed_holder_whose_parent_does_not_ask_for_its_end_is_dead(
    storage: Path, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    process = holder()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert dead_leases(storage) == [path_of(storage)]
    with lease(storage, "abc", print, never, patient=False) as held:
        assert held.dead is not None
    process.wait()


def test_a_clock_that_is_set_kills_nobody(
    storage: Path, monkeypatch: pytest.MonkeyPatch, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    process = holder()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    monkeypatch.setattr("psutil.Process.create_time", lambda _: 0.0)
    assert dead_leases(storage) == []
    process.kill()
    process.wait()
    assert dead_leases(storage) == [path_of(storage)]


def test_a_holder_elsewhere_is_busy_once_it_renews(storage: Path) -> None:
    path = path_of(storage)
    path.parent.mkdir(parents=True)
    elsewhere = {"owner": "x", "host": "elsewhere", "pid": 1, "process_started": 0.0}

    def renew() -> None:
        for renewals in range(200):
            write_json(path, elsewhere | {"renewals": renewals})
            time.sleep(0.05)

    write_json(path, elsewhere | {"renewals": 0})
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    with pytest.raises(Busy), lease(storage, "abc", print, never, patient=False):
        pass

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from services.loopback import Handler, serving_by

import infra.servers
from infra.servers import ServerFailed, ask_prefect, read_credentials

CALL = """
import os, sys
from pathlib import Path
from infra.servers import read_credentials
print(read_credentials(Path(sys.argv[1])).password)
"""
# Dies where the content is on its way to the disk.
KILLED = CALL.replace("print", "os.fsync = lambda _: os.kill(os.getpid(), 9)\nprint")


def test_credentials_are_made_once_for_the_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = read_credentials(home)
    assert read_credentials(home) == made
    assert (home / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in home.iterdir()] == ["credentials.json"]


def test_a_kill_while_they_are_written_leaves_no_half_file(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "credentials.json").exists()
    assert len(read_credentials(tmp_path).password) == 32
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_first_starts_at_the_same_time_agree(tmp_path: Path) -> None:
    calls = [
        subprocess.Popen([sys.executable, "-c", CALL, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    passwords = {call.communicate(timeout=300)[0] for call in calls}
    assert [call.returncode for call in calls] == [0] * 4
    assert len(passwords) == 1


def test_the_first_of_two_that_found_no_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_credentials(tmp_path)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "credentials.json" and exists(path))
    assert read_credentials(tmp_path) == first


@pytest.mark.parametrize("text", ["", "[]", '{"user": "speck"}'])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "credentials.json").write_text(text)
    with pytest.raises(ServerFailed, match=r"credentials\.json' does not hold .* delete it"):
        read_credentials(tmp_path)


@contextmanager
def answering(*answers: int | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers in turn, the last one for ever, and None by silence; and what it was asked."""
    bodies: list[bytes] = []
    over = threading.Event()

    class Answering(Handler):
        def do_POST(self) -> None:
            bodies.append(self.body())
            status = answers[min(len(bodies), len(answers)) - 1]
            if status is None:
                over.wait(30)
            else:
                self.answer(status, b'["it"]')

    with serving_by(Answering) as url:
        try:
            yield f"{url}/api", bodies
        finally:
            over.set()


def test_prefect_is_asked_again_while_its_database_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infra.servers, "ANSWER_S", 0.5)
    with answering(503, None, 200) as (url, bodies):
        assert ask_prefect(url, "Basic x", "/flow_runs/filter", {"limit": 1}) == ["it"]
    # More where this machine took longer than that for an answer.
    assert len(bodies) >= 3
    assert set(bodies) == {b'{"limit": 1}'}


def test_prefect_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infra.servers, "ANSWER_S", 0.5)
    with answering(None) as (url, _), pytest.raises(TimeoutError):
        ask_prefect(url, "Basic x", "flow_runs/filter", {}, patience_s=0.1)
    monkeypatch.undo()
    with answering(503) as (url, _), pytest.raises(urllib.error.HTTPError):
        ask_prefect(url, "Basic x", "flow_runs/filter", {}, patience_s=0.1)


def test_what_prefect_refuses_is_not_asked_again() -> None:
    with answering(409, 200) as (url, bodies), pytest.raises(urllib.error.HTTPError):
        ask_prefect(url, "Basic x", "flow_runs/filter", {})
    assert len(bodies) == 1

"""What `speck up` settles before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.processes import wait_until

from infra import stack as module
from infra.health import fault
from infra.processes import marked
from infra.servers import Credentials, ServerFailed
from infra.stack import make_private_folder, open_stack, settle, stack_home
from infra.stack_lifecycle import down
from infra.supervision import Supervisor

ROOT = Path(__file__).parents[3]
SOCKETS = module.Stack.sockets


@pytest.fixture(autouse=True)
def sockets_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "postgres_folder", lambda: None)
    monkeypatch.setattr(module.Stack, "sockets", property(lambda _: tmp_path / "sockets"))


def test_what_was_settled_is_found_again_and_is_the_owners_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert open_stack(home, tmp_path) is None
    made = settle(home, tmp_path)
    assert open_stack(home, tmp_path) == made
    assert len(set(made.ports.values())) == len(made.ports)
    for name in ("stack.json", "stack.env", "credentials.json"):
        assert (home / name).stat().st_mode & 0o777 == 0o600
    assert settle(home, tmp_path).ports == made.ports, "the same addresses as long as they are free"


def test_a_port_that_somebody_else_took_is_replaced(tmp_path: Path) -> None:
    made = settle(tmp_path / "home", tmp_path)
    with socket.create_server(("127.0.0.1", made.ports["mlflow"])):
        again = settle(tmp_path / "home", tmp_path)
    assert again.ports["mlflow"] != made.ports["mlflow"]
    assert {**again.ports, "mlflow": 0} == {**made.ports, "mlflow": 0}
    assert (
        f"MLFLOW_TRACKING_URI=http://127.0.0.1:{again.ports['mlflow']}\n" in (tmp_path / "home/stack.env").read_text()
    )


def test_a_shell_that_sources_it_has_the_clients_environment(tmp_path: Path) -> None:
    made = settle(tmp_path / "it's $HOME", tmp_path)
    script = f'source "$0"; exec env -0 {" ".join(made.client_environment())}'.split(";")[0]
    shell = subprocess.run(
        ["bash", "-c", f"{script}; env -0", str(made.home / "stack.env")], capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
    assert {name: found.get(name) for name in made.client_environment()} == made.client_environment()


def test_a_damaged_record_is_named_with_its_remedy(tmp_path: Path) -> None:
    settle(tmp_path, tmp_path)
    (tmp_path / "stack.json").write_text(json.dumps({"ports": {}}))
    with pytest.raises(ServerFailed, match=r"stack\.json' does not hold ports and has_postgres. Delete it"):
        open_stack(tmp_path, tmp_path)


def test_a_folder_that_others_may_use_is_refused(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "mine")
    make_private_folder(tmp_path / "mine")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link"):
        with pytest.raises(ServerFailed, match="must be a folder that nobody else can use"):
            make_private_folder(tmp_path / name)


def test_the_stack_of_a_shell_that_sourced_it_is_the_same(tmp_path: Path) -> None:
    made = settle(stack_home(tmp_path), tmp_path)
    assert made.home == tmp_path / "stack"
    assert stack_home(Path(made.client_environment()["SPECK_HOME"])) == made.home


def test_no_secret_of_one_server_tells_another(tmp_path: Path) -> None:
    made = Credentials("speck", "password", "key")
    secrets = {made.secret_of("s3"), made.secret_of("postgres"), made.password, made.session_key}
    assert len(secrets) == 4
    assert made.secret_of("s3") == Credentials("speck", "other", "key").secret_of("s3")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_supervisor_that_lost_its_socket_is_stopped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: signal.Signals
) -> None:
    """By the signal that asks for it, or, where that is ignored, by the other."""
    monkeypatch.setattr("infra.supervision.STOP_WAIT_S", -9.5)
    made, said = settle(tmp_path / "home", tmp_path), []
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ending == signal.SIGKILL else ""
    code = f"import signal, time; {ignoring}print(flush=True); time.sleep(600)"
    program = [sys.executable, "-c", code, str(made.home / "supervisord.conf")]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as supervisor:
        try:
            assert supervisor.stdout is not None
            supervisor.stdout.readline()
            (made.home / "supervisord.pid").write_text(str(supervisor.pid))
            assert Supervisor(made).process() is not None
            assert down(made, said.append)
            assert supervisor.wait(300) == -ending
        finally:
            supervisor.kill()
    assert [line.partition(" (")[0] for line in said] == ["Prefect did not say which flow runs end now"]
    assert not down(made, said.append)


def test_without_a_supervisor_there_is_no_process(tmp_path: Path) -> None:
    made = settle(tmp_path / "home", tmp_path)
    assert Supervisor(made).process() is None
    (made.home / "supervisord.pid").write_text(str(os.getpid()))
    assert Supervisor(made).process() is None, "the number is another process's by now"
    with pytest.raises(ServerFailed, match="does not answer"):
        Supervisor(made).processes()


@pytest.mark.slow
def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Stack, "services", property(lambda _: ("s3",)))
    # The supervisor's processes have the real one.
    monkeypatch.setattr(module.Stack, "sockets", SOCKETS)
    made = settle(tmp_path / "a home", ROOT)
    supervisor = Supervisor(made)
    supervisor.start()
    try:
        wait_until(lambda: fault(made, "s3") is None, 60, "S3")
        assert len(marked(made.mark(""))) == 3, "the guard, the door and rclone"
        process = supervisor.process()
        assert process is not None
        process.kill()
        wait_until(lambda: marked(made.mark("")) == [], 60, "the end of the service")
        assert fault(made, "s3") == "does not answer"
    finally:
        supervisor.shut_down()
        shutil.rmtree(made.sockets)

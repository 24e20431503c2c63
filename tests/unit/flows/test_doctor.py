"""What `speck doctor` finds, on real files, processes and a small HTTP server."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from services.loopback import Handler, serving_by

from flows import doctor
from flows.doctor import SOME_DOWN, UP, WAIT, examine
from flows.doctor_services import Endpoint, clock_skew_s, endpoints, refusal
from flows.lease import _place, dead_leases
from flows.settings import REPO, Settings
from infra.servers import Credentials, read_credentials
from infra.stack import MARK, Stack, settle
from infra.stack_lifecycle import ServiceState
from training.checkpoint import write_json


@contextmanager
def mlflow_like(allowed: set[str | None], ahead_s: float = 0.0) -> Iterator[str]:
    """A server that answers 200 to these `Authorization` headers, 401 to others, its clock ahead."""

    now = time.time

    class Ahead(Handler):
        def do_GET(self) -> None:
            self.answer(200 if self.headers.get("Authorization") in allowed else 401)

        def date_time_string(self, _: float | None = None) -> str:
            return super().date_time_string(now() + ahead_s)

    with serving_by(Ahead) as url:
        yield url


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Names a server in the environment, and returns what the doctor makes of it."""

    def named(url: str) -> Endpoint:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "speck")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
        return next(one for one in endpoints(Settings()) if one.name == "MLflow")

    return named  # type: ignore[return-value]


RIGHT = Credentials("speck", "right", "").basic


def test_a_server_that_knows_us_alone_is_sound(mlflow: object) -> None:
    with mlflow_like({RIGHT}) as url:
        assert refusal(mlflow(url)) is None  # type: ignore[operator]
    found = refusal(mlflow(url))  # type: ignore[operator]
    assert found is not None
    assert found[0] == "does not answer"


def test_a_server_that_answers_anybody_or_not_us_is_named(mlflow: object) -> None:
    with mlflow_like({RIGHT, None}) as url:
        assert refusal(mlflow(url))[0] == "answers 200 to none credentials"  # type: ignore[operator]
    with mlflow_like({RIGHT, Credentials("speck", "no-such-password", "").basic}) as url:
        assert refusal(mlflow(url))[0] == "answers 200 to wrong credentials"  # type: ignore[operator]
    with mlflow_like(set()) as url:
        assert refusal(mlflow(url))[0] == "answers 401 to our credentials"  # type: ignore[operator]


@pytest.mark.parametrize(("ahead_s", "level"), [(0, "OK"), (-100, "WARN"), (3600, "FAIL")])
def test_a_clock_that_differs_is_told(mlflow: object, ahead_s: float, level: str) -> None:
    with mlflow_like({RIGHT}, ahead_s) as url:
        endpoint = mlflow(url)  # type: ignore[operator]
        skew = clock_skew_s(endpoint)
        assert skew is not None
        assert abs(skew - ahead_s) < 5
        assert doctor._clocks([endpoint]).level == level


def test_a_ray_of_another_version_or_without_our_token_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECK_RAY_JOBS_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    (ray,) = [one for one in endpoints(Settings()) if one.name == "Ray"]
    assert [check.level for check in doctor._endpoints([ray])] == ["FAIL"]
    sound = {"ours": 200}
    for theirs, level in ((version("ray"), "OK"), ("2.0.0", "WARN")):
        told = replace(ray, answer=lambda kind: sound.get(kind, 401), version=lambda theirs=theirs: theirs)
        assert [(check.what, check.level) for check in doctor._endpoints([told])][1:] == [("version of Ray", level)]


def test_secrets_that_others_may_read_fail(tmp_path: Path) -> None:
    read_credentials(tmp_path)
    assert doctor._credentials({tmp_path}).level == "OK"
    (tmp_path / "credentials.json").chmod(0o640)
    found = doctor._credentials({tmp_path})
    assert (found.level, found.remedy.split(",")[0]) == ("FAIL", f"chmod 600 {tmp_path / 'credentials.json'}")


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"pytest=={version('pytest')}\nPsUtil=={version('psutil')}\nno_such-package==1\n")
    assert doctor._packages(lock).found == "2 as in requirements.lock"
    lock.write_text("prefect==1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "distributions", list)
        assert "prefect is missing (locked: 1)" in doctor._packages(lock).found
    lock.write_text("pytest==0.0.1\n")
    found = doctor._packages(lock)
    assert (found.level, found.remedy) == ("WARN", "make .venv")
    assert f"pytest {version('pytest')} (locked: 0.0.1)" in found.found


def test_processes_of_a_stack_without_supervisor_are_found(tmp_path: Path) -> None:
    environment = os.environ | {MARK: f"{tmp_path}:mlflow"}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE) as process:
        found = [check for check in doctor._orphans(REPO) if f"SPECK_HOME={tmp_path} speck down" in check.remedy]
        process.kill()
    assert [check.level for check in found] == ["FAIL"]
    assert str(process.pid) in found[0].found


def test_leases_of_dead_processes_are_told(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    mine = {"owner": "a", "host": platform.node(), "place": _place(), "pid": os.getpid(), "process_started": "0"}
    write_json(tmp_path / "leases" / "gone.json", mine)
    write_json(tmp_path / "leases" / "elsewhere.json", mine | {"place": "another boot"})
    assert [path.stem for path in dead_leases(tmp_path / "runs")] == ["gone"]
    assert doctor._leases(tmp_path / "runs").level == "WARN"


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for free_gib, level in ((50, "OK"), (5, "WARN"), (0.5, "FAIL")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free_gib: type("U", (), {"free": free * 2**30}))
        (check,) = doctor._disks({"home": tmp_path / "not yet" / "there"})
        assert check.level == level


def use_stack(home: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """Settles a stack that nobody starts, and makes this process a shell that sourced its `stack.env`."""
    monkeypatch.setattr(Stack, "sockets", property(lambda _: home / "sockets"))
    stack = settle(home / "stack", REPO)
    for name, value in stack.client_environment().items():
        monkeypatch.setenv(name, value)
    return stack


def test_of_a_stack_that_is_down_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stack(tmp_path, monkeypatch)
    checks = [check for check in examine(tmp_path, REPO) if check.what not in ("orphans", "packages", "disk of home")]
    assert [(check.what, check.found, check.remedy) for check in checks if check.level != "OK"] == [
        ("stack", "the stack is down", "`speck up` starts it")
    ]
    assert {"Prefect", "MLflow", "Ray", "S3", "services", "DVC remote"} & {check.what for check in checks} == set()


def test_a_stack_that_is_down_is_no_fault_where_nothing_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "SPECK_", "RAY_")):
            monkeypatch.delenv(name)
    settle(tmp_path / "stack", REPO)
    checks = {check.what: check for check in examine(tmp_path, REPO)}
    assert (checks["stack"].level, checks["services"].level) == ("OK", "OK")
    assert checks["stack"].found == "the stack is down, and this shell does not use it: `speck up` starts it"


def service(name: str, fault: str | None, uptime_s: float | None = None) -> ServiceState:
    return ServiceState(name, fault, None if uptime_s is None else 1, uptime_s, "")


@pytest.mark.parametrize(
    ("faults", "remedy"),
    [
        ([service("s3", None, 9000), service("mlflow", None, 9000)], ""),
        ([service("s3", None, 5), service("mlflow", "does not answer", 5)], WAIT),
        ([service("s3", None, 5), service("mlflow", "down (backoff)")], WAIT),
        ([service("s3", "down (backoff)"), service("mlflow", "does not answer", 5)], WAIT),
        ([service("s3", None, 9000), service("mlflow", "does not answer", 9000)], SOME_DOWN),
        ([service("s3", "down (fatal)"), service("mlflow", "does not answer", 5)], SOME_DOWN),
        ([service("s3", "down (fatal)"), service("mlflow", "down (stopped)")], UP),
    ],
)
def test_the_remedy_fits_how_the_stack_is(faults: list[ServiceState], remedy: str) -> None:
    found = doctor._stack(faults, is_used=True)
    assert (found.level, found.remedy) == ("FAIL" if remedy else "OK", remedy)
    if remedy in (WAIT, SOME_DOWN):
        named = [one.name for one in faults if one.fault is not None]
        assert [name for name in ("s3", "mlflow") if f"{name}: " in found.found] == named


def test_embedded_there_is_nothing_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_", "SPECK_", "RAY_")):
            monkeypatch.delenv(name)
    checks = {check.what: check for check in examine(tmp_path, REPO)}
    assert checks["services"].found == "embedded: nothing runs between commands"
    assert checks["credentials"].level == checks["leases"].level == checks["clocks"].level == "OK"

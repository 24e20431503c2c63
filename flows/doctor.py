"""What is wrong on this machine, and what to do about it. Works whether servers run or everything is embedded."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, requires, version
from pathlib import Path
from typing import Literal

import psutil

from data.remote import IN_REMOTE, remote_states, remote_url
from data.store import default_root
from flows.doctor_services import Endpoint, clock_skew_s, endpoints, refusal
from flows.lease import dead_leases
from flows.settings import Settings
from infra.processes import is_alive
from infra.stack import MARK, open_stack, stack_home
from infra.stack_lifecycle import START_S, ServiceState, states
from infra.supervision import Supervisor

GIB = 2**30
LOW_GIB, EMPTY_GIB = 10.0, 1.0
# S3 refuses signatures that are a quarter of an hour off.
SKEW_WARN_S, SKEW_FAIL_S = 30.0, 300.0
UP = "`speck up` starts it"
SOME_DOWN = "`speck up` starts what is down; `speck logs` says why it is"
WAIT = f"wait: that takes less than {START_S:.0f} s. If it lasts, `speck logs` says why"
SECRET_FILES = ("credentials.json", "ray_token", "stack.env", "stack.json", "supervisord.conf", "mlflow-auth.db")
# Parts of the command lines of what the pipeline starts, and what must not outlive it.
SERVERS = ("gcs_server", "raylet/raylet", "ray/dashboard/", "prefect server start", "mlflow server", "mlflow.server",
           "infra/guard.py", "infra.stack_service")  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` is empty where all is well."""

    level: Literal["OK", "WARN", "FAIL"]
    what: str
    found: str
    remedy: str = ""


def examine(home: Path, repo: Path) -> Iterator[Check]:
    """All checks, in the order in which one would mend things.

    A stack that runs is examined as a shell sees it that sourced its `stack.env`: this changes this process's
    environment.
    """
    stack = open_stack(stack_home(home), repo)
    told: set[str] = set()
    if stack is not None:
        is_supervised = Supervisor(stack).process() is not None
        is_used = os.environ.get("PREFECT_API_URL") == stack.api_url
        how = _stack(states(stack), is_used=is_used or is_supervised)
        yield how
        if how.remedy in (UP, WAIT):
            told |= {*stack.client_environment().values()}
        if is_supervised and not is_used:
            remedy = f"source {stack.home / 'stack.env'}"
            yield Check("WARN", "shell", "commands of this shell do not use the stack that runs", remedy)
        if is_supervised:
            os.environ.update(stack.client_environment())
    settings = Settings()
    named = list(endpoints(settings))
    if not named:
        yield Check("OK", "services", "embedded: nothing runs between commands")
    # That a server of the stack is away was told with the stack.
    found = [one for one in named if one.url not in told or one.answer("ours") is not None]
    yield from _endpoints(found)
    yield _credentials({home, settings.home})
    yield _clocks(found)
    yield from _disks({"home": settings.home, "store": default_root(), "repository": repo, "temporary": Path("/tmp")})
    yield _packages(repo / "requirements.lock")
    yield from _orphans(repo)
    yield _leases(settings.storage)
    remote = _remote(repo)
    if remote.level == "OK" or all(one in found for one in named if one.name == "S3"):
        yield remote


def _stack(found: list[ServiceState], *, is_used: bool) -> Check:
    """One line about all of it. That it is down is no fault where this shell does not use it."""
    faults = [state for state in found if state.fault is not None]
    if not faults:
        return Check("OK", "stack", f"{len(found)} services work")
    each = "; ".join(f"{state.name}: {state.fault}" for state in faults)
    if all(map(_is_starting, faults)):
        return Check("FAIL", "stack", f"it is starting: {each}", WAIT)
    if any(state.pid is not None for state in found):
        return Check("FAIL", "stack", each, SOME_DOWN)
    if is_used:
        return Check("FAIL", "stack", "the stack is down", UP)
    return Check("OK", "stack", f"the stack is down, and this shell does not use it: {UP}")


def _is_starting(state: ServiceState) -> bool:
    """Whether it began a moment ago, or ended at once and is tried again."""
    is_young = state.uptime_s is not None and state.uptime_s < START_S
    return is_young or state.fault in ("down (starting)", "down (backoff)")


def _endpoints(found: list[Endpoint]) -> Iterator[Check]:
    for endpoint in found:
        what = refusal(endpoint)
        if what is not None:
            yield Check("FAIL", endpoint.name, f"{endpoint.url} {what[0]}", what[1])
            continue
        yield Check("OK", endpoint.name, f"{endpoint.url} answers to our credentials, and to no others")
        if endpoint.package is not None and (theirs := endpoint.version()) is not None:
            ours = version(endpoint.package)
            remedy = "" if theirs == ours else "install the same on both sides; Ray refuses jobs of another version"
            text = f"the server's is {theirs}, ours {ours}"
            yield Check("WARN" if remedy else "OK", f"version of {endpoint.name}", text, remedy)


def _credentials(homes: set[Path]) -> Check:
    paths = [home / name for home in homes for name in SECRET_FILES]
    if token := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        paths.append(Path(token))
    there = sorted({path for path in paths if path.exists()})
    loose = [str(path) for path in there if path.stat().st_mode & 0o077]
    if loose:
        remedy = f"chmod 600 {' '.join(loose)}, and make new credentials if somebody may have read them"
        return Check("FAIL", "credentials", f"others may read {', '.join(loose)}", remedy)
    return Check("OK", "credentials", f"{len(there)} files, for their owner alone")


def _clocks(found: list[Endpoint]) -> Check:
    skews = {endpoint.name: skew for endpoint in found if (skew := clock_skew_s(endpoint)) is not None}
    if not skews:
        return Check("OK", "clocks", "no server to compare with")
    name, skew = max(skews.items(), key=lambda item: abs(item[1]))
    text = f"{name}'s clock is {skew:+.0f} s from this machine's"
    if abs(skew) < SKEW_WARN_S:
        return Check("OK", "clocks", text)
    remedy = "synchronise both machines (chrony or systemd-timesyncd); S3 refuses requests that are 15 minutes off"
    return Check("FAIL" if abs(skew) >= SKEW_FAIL_S else "WARN", "clocks", text, remedy)


def _disks(folders: dict[str, Path]) -> Iterator[Check]:
    seen: set[int] = set()
    for name, folder in folders.items():
        place = next(path for path in (folder, *folder.parents) if path.exists())
        device = place.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free_gib = shutil.disk_usage(place).free / GIB
        text = f"{free_gib:.1f} GiB free at {folder}"
        if free_gib >= LOW_GIB:
            yield Check("OK", f"disk of {name}", text)
        else:
            level: Literal["FAIL", "WARN"] = "FAIL" if free_gib < EMPTY_GIB else "WARN"
            yield Check(level, f"disk of {name}", text, "`speck gc` shows what is not needed; --delete frees it")


def _packages(lock: Path) -> Check:
    wanted = dict(line.split("==") for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line)
    locked = {_canonical(name): version for name, version in wanted.items()}
    installed: dict[str, str] = {}
    for found in distributions():
        # Of a package that is there twice, the first is imported. What follows + says for which machine it was built.
        installed.setdefault(_canonical(found.metadata["Name"] or ""), found.version.partition("+")[0])
    asked = {_canonical(re.split(r"[^\w.-]", line)[0]) for line in requires("speck") or () if "extra ==" not in line}
    other = [
        f"{name} {installed.get(name, 'is missing')} (locked: {version})"
        for name, version in sorted(locked.items())
        if (name in installed or name in asked) and installed.get(name) != version
    ]
    if other:
        return Check("WARN", "packages", f"not as tested: {', '.join(other)}", "make .venv")
    return Check("OK", "packages", f"{len(locked.keys() & installed.keys())} as in requirements.lock")


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _orphans(repo: Path) -> Iterator[Check]:
    dead: dict[Path, list[int]] = {}
    left: list[int] = []
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or not is_alive(process):
                continue
            mark, command = process.environ().get(MARK, ""), " ".join(process.cmdline())
            if mark:
                dead.setdefault(Path(mark.rpartition(":")[0]), []).append(process.pid)
            elif _is_orphan(process) and any(part in command for part in SERVERS):
                left.append(process.pid)
        except psutil.Error:
            continue
    dead = {home: pids for home, pids in dead.items() if not _is_supervised(home, repo)}
    for home, pids in dead.items():
        text = f"{len(pids)} of a stack without supervisor: {_listed(pids)}"
        yield Check("FAIL", "orphans", text, f"SPECK_HOME={home} speck down")
    if left:
        text = f"servers that nobody waits for: {_listed(left)}"
        yield Check("WARN", "orphans", text, f"if none of them is yours: kill {_listed(left)}")
    if not dead and not left:
        yield Check("OK", "orphans", "none")


def _is_orphan(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is None or parent.pid == 1 or parent.name() == "systemd"


def _is_supervised(home: Path, repo: Path) -> bool:
    stack = open_stack(home, repo)
    return stack is not None and Supervisor(stack).process() is not None


def _listed(pids: list[int]) -> str:
    return " ".join(str(pid) for pid in sorted(pids))


def _leases(storage: Path) -> Check:
    dead = dead_leases(storage)
    if dead:
        text = f"{len(dead)} of processes that are gone: {', '.join(path.stem for path in dead)}"
        return Check("WARN", "leases", text, "none is needed: the next run of these cells takes them over")
    return Check("OK", "leases", "none of a process that is gone")


def _remote(repo: Path) -> Check:
    url = remote_url(repo)
    # No version has this name: whether it is there does not matter, only that the remote says so.
    states, reason = remote_states({"any": "0" * 32}, repo)
    if states["any"] == "no remote":
        return Check("OK", "DVC remote", "none: dataset versions are on this machine alone")
    if states["any"] in {IN_REMOTE, "not in the remote"}:
        return Check("OK", "DVC remote", f"{url} answers")
    return Check("FAIL", "DVC remote", f"{url}: {reason}", "correct `dvc remote modify`, AWS_* or the server")

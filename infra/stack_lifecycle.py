"""The stack's life: up, how it is, down."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from os import environ
from pathlib import Path

from filelock import FileLock

from infra.health import bearer, fault
from infra.servers import ANSWER_S, ServerFailed, ask, ask_prefect
from infra.stack import WORK_POOL, Stack, open_stack, settle
from infra.supervision import Process, Supervisor

# A service that starts needs less, also on cores that train.
START_S = 240.0
POLL_S = 0.5
# Longer than Ray leaves a job that it asked to stop, training.cluster.KILL_AFTER_S.
JOBS_STOP_S = 25.0


@dataclass(frozen=True)
class ServiceState:
    """One line of `speck status`: `fault` in a few words, None where it works; `pid` and `uptime_s` where it runs."""

    name: str
    fault: str | None
    pid: int | None
    uptime_s: float | None
    url: str


def up(home: Path, repo: Path, say: Callable[[str], None]) -> Stack:
    """Start what is not running, wait until all of it works, and deploy what prefect.yaml of `repo` declares.

    Raises ServerFailed, with the end of a log, when a service does not start, or a deployment fails.
    """
    home.mkdir(parents=True, exist_ok=True)
    # Of two at once the second finds what the first has done.
    with FileLock(home / ".stack.lock"):
        stack = open_stack(home, repo)
        if stack is None or Supervisor(stack).process() is None:
            if stack is not None:
                # Of a supervisor that was killed.
                Supervisor(stack).shut_down()
            stack = settle(home, repo)
            Supervisor(stack).start()
        else:
            _repair(stack, say)
        _await(stack, say)
    return stack


def states(stack: Stack) -> list[ServiceState]:
    """How each service is now."""
    supervisor = Supervisor(stack)
    try:
        processes = supervisor.processes() if supervisor.process() is not None else {}
    except ServerFailed:
        processes = {}
    return [_state(stack, name, processes.get(name)) for name in stack.services]


def down(stack: Stack, say: Callable[[str], None]) -> bool:
    """Stop everything, keep the data; False if nothing was running. Raises ServerFailed when something does not end."""
    supervisor = Supervisor(stack)
    with FileLock(stack.home / ".stack.lock"):
        was_running = supervisor.process() is not None
        if was_running:
            # Its flow runs end with it. Prefect would take them for running until the silence is noticed.
            with suppress(ServerFailed):
                supervisor.stop_service("worker")
            mark_runs(stack.api_url, stack.credentials.basic, say)
            # Not those of another cluster that has the port by now.
            with suppress(ServerFailed):
                if supervisor.processes()["ray-head"].state == "RUNNING":
                    stop_jobs(stack, say)
        supervisor.shut_down()
    return was_running


def mark_runs(api_url: str, authorization: str, say: Callable[[str], None]) -> None:
    """Tell Prefect that the flow runs of a worker that was stopped have ended: cancelled where that was asked, else
    crashed. What is not marked is told by `say`."""
    under_way = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    of_worker = {"work_pools": {"name": {"any_": [WORK_POOL]}}}
    otherwise = "the next run of the deployment marks what was under way, or the automation *silent -> crashed*"
    try:
        runs = ask_prefect(api_url, authorization, "flow_runs/filter", under_way | of_worker, patience_s=ANSWER_S)
    except (OSError, ValueError) as error:
        say(f"Prefect did not say which flow runs end now ({error}); {otherwise}")
        return
    for run in runs:
        ended = "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED"
        state = {"type": ended, "message": "the stack was stopped; the next run goes on from the newest checkpoint"}
        path, asked = f"flow_runs/{run['id']}/set_state", {"state": state, "force": True}
        try:
            ask_prefect(api_url, authorization, path, asked, patience_s=ANSWER_S)
        except (OSError, ValueError) as error:
            say(f"flow run {run['name']!r} is not marked as {ended.lower()} ({error}); {otherwise}")
        else:
            say(f"flow run {run['name']!r} was under way and is marked as {ended.lower()}; the next one goes on")


def stop_jobs(stack: Stack, say: Callable[[str], None]) -> None:
    """Ask the Ray jobs of a stack to stop, which keep a checkpoint then, and wait for their end.

    Where Ray does not answer, or a job does not end, `say` is told, and their newest checkpoints are older.
    """
    url, deadline = f"{stack.url('ray-head')}/api/jobs/", time.monotonic() + JOBS_STOP_S
    asked: set[str] = set()
    try:
        authorization = bearer(stack)
        while jobs := _living_jobs(url, authorization):
            for job in sorted(jobs - asked):
                say(f"Ray job {job} is asked to keep a checkpoint and stop")
                ask(f"{url}{job}/stop", authorization, {}, timeout_s=ANSWER_S).close()
            asked |= jobs
            if time.monotonic() > deadline:
                names = ", ".join(sorted(jobs))
                say(f"these jobs have not stopped: {names}; what follows their newest checkpoint is lost")
                return
            time.sleep(POLL_S)
    except (OSError, ValueError) as error:
        say(f"Ray did not say whether its jobs have stopped ({error})")


def _living_jobs(url: str, authorization: str) -> set[str]:
    # Cores that train may keep it waiting.
    with ask(url, authorization, timeout_s=ANSWER_S) as answer:
        jobs = json.load(answer)
    return {job["submission_id"] for job in jobs if job["type"] == "SUBMISSION" and job["end_time"] is None}


def _state(stack: Stack, name: str, process: Process | None) -> ServiceState:
    if process is None or not process.is_alive or not process.pid:
        state = "down" if process is None else f"down ({process.state.lower()})"
        return ServiceState(name, state, None, None, stack.url(name))
    found = fault(stack, name, process.since_s)
    return ServiceState(name, found, process.pid, max(0.0, time.time() - process.since_s), stack.url(name))


def _repair(stack: Stack, say: Callable[[str], None]) -> None:
    supervisor = Supervisor(stack)
    processes = supervisor.processes()
    faults = {state.name: state for state in states(stack) if state.fault is not None}
    for name, state in faults.items():
        if not processes[name].is_alive:
            say(f"{name} is {state.fault}: starting it")
            supervisor.start_service(name)
        # One that waits for another is not stuck.
        elif state.uptime_s is not None and state.uptime_s > START_S and not faults.keys() & {*stack.needs(name)}:
            say(f"{name} {state.fault}: starting it again")
            supervisor.restart_service(name)


def _await(stack: Stack, say: Callable[[str], None]) -> None:
    """Wait until all services work. Meanwhile, as soon as there is a worker, the deployments are made."""
    deadline = time.monotonic() + START_S
    deploying: subprocess.Popen[str] | None = None
    waiting = list(stack.services)
    try:
        while waiting:
            for state in states(stack):
                if state.fault is None and state.name in waiting:
                    waiting.remove(state.name)
                    say(f"{state.name} works")
                elif state.fault == "down (fatal)" or (state.name in waiting and time.monotonic() > deadline):
                    raise ServerFailed(f"{state.name}: {state.fault}. {_end_of_log(stack, state.name)}")
            if deploying is None and "worker" not in waiting:
                deploying = _deploy(stack)
            time.sleep(POLL_S if waiting else 0)
        said, _ = deploying.communicate(timeout=START_S) if deploying is not None else ("", None)
    except subprocess.TimeoutExpired:
        raise ServerFailed(
            f"the deployments of prefect.yaml were not made within {START_S:.0f} s. {_end_of_log(stack, 'prefect')}"
        ) from None
    finally:
        if deploying is not None and deploying.poll() is None:
            deploying.kill()
    if deploying is not None and deploying.returncode:
        raise ServerFailed(f"the deployments of prefect.yaml were not made:\n{said.strip()}")
    say("deployments are made")


def _deploy(stack: Stack) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=stack.repo, env={**environ, **stack.client_environment()}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _end_of_log(stack: Stack, name: str) -> str:
    path = stack.logs / f"{name}.log"
    lines = ["nothing"]
    with suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    return f"Read {str(path)!r}, which ends:\n" + "\n".join(lines)

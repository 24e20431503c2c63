"""The stack's supervisor: `supervisord`, which starts every service again that ends, and its control socket.

Chosen over circus: no message queue underneath, no compiled part, and its socket is a file that nobody else can open.
"""

from __future__ import annotations

import http.client
import os
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from infra.processes import is_alive, kill_marked, still_alive
from infra.servers import ServerFailed
from infra.stack import Stack, write_private

# Longer than what a guard gives a service.
STOP_WAIT_S = 30
START_S = 20.0
# Delays grow by a second each: three minutes in all, then `speck up` has to ask for it.
NUM_RETRIES = 20


@dataclass(frozen=True)
class Process:
    """What the supervisor knows of a service: `state` in its own words; `since_s` of time.time, 0 if not alive."""

    name: str
    state: str
    pid: int
    since_s: float

    @property
    def is_alive(self) -> bool:
        """False where the supervisor does not run it, nor tries to."""
        return self.state in {"STARTING", "RUNNING", "BACKOFF"}


class Supervisor:
    """The supervisor of one stack, which may or may not run."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._socket = stack.sockets / "supervisor.sock"
        self._pid_file = stack.home / "supervisord.pid"

    def process(self) -> psutil.Process | None:
        """The supervisor's own process, None where there is none."""
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            found = psutil.Process(int(self._pid_file.read_text()))
            if str(self._configuration) in found.cmdline() and is_alive(found):
                return found
        return None

    def start(self) -> None:
        """Start it and with it all services. Raises ServerFailed when it does not come up."""
        write_private(self._configuration, self._text())
        command = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self._configuration)]
        done = subprocess.run(command, cwd=self._stack.repo, capture_output=True, text=True, check=False)
        deadline = time.monotonic() + START_S
        while done.returncode == 0 and time.monotonic() < deadline:
            with suppress(ServerFailed):
                self.processes()
                return
            time.sleep(0.1)
        log = self._stack.logs / "supervisord.log"
        raise ServerFailed(f"the supervisor did not start: {done.stderr.strip() or done.stdout.strip()}. Read {log}")

    def processes(self) -> dict[str, Process]:
        """All services by name. Raises ServerFailed when the supervisor does not answer."""
        return {
            info["name"]: Process(
                info["name"], info["statename"], info["pid"], float(info["start"]) if info["pid"] else 0.0
            )
            for info in self._call("getAllProcessInfo")
        }

    def start_service(self, name: str) -> None:
        """Have it started, without waiting."""
        with suppress(xmlrpc.client.Fault):
            self._call("startProcess", name, False)

    def stop_service(self, name: str) -> None:
        """Stop it and wait for its end; it stays down."""
        with suppress(xmlrpc.client.Fault):
            self._call("stopProcess", name, True)

    def restart_service(self, name: str) -> None:
        """Stop it, wait for its end, and have it started again."""
        self.stop_service(name)
        self.start_service(name)

    def shut_down(self) -> None:
        """Stop all services and the supervisor, and what they left behind. Raises ServerFailed when some do not end."""
        if (process := self.process()) is not None:
            with suppress(psutil.NoSuchProcess):
                self._ask_to_end(process)
                for one in still_alive([process], STOP_WAIT_S + 10):
                    one.kill()
        if alive := kill_marked(self._stack.mark(""), STOP_WAIT_S):
            raise ServerFailed(f"these processes do not end: {', '.join(str(one.pid) for one in alive)}")
        self._socket.unlink(missing_ok=True)

    def _ask_to_end(self, process: psutil.Process) -> None:
        try:
            self._call("shutdown")
        except (ServerFailed, xmlrpc.client.Fault):
            # Its socket is gone, or it ends already: a signal asks for the same.
            process.terminate()

    @property
    def _configuration(self) -> Any:
        return self._stack.home / "supervisord.conf"

    def _call(self, method: str, *arguments: object) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        try:
            proxy = xmlrpc.client.ServerProxy("http://localhost", transport=transport)
            return getattr(proxy.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(
                f"the supervisor does not answer at {str(self._socket)!r} ({error}). `speck down`, then `speck up`"
            ) from error
        finally:
            transport.close()

    def _text(self) -> str:
        stack = self._stack
        sections: dict[str, dict[str, object]] = {
            "unix_http_server": {"file": self._socket, "chmod": "0600"},
            "supervisord": {
                "logfile": stack.logs / "supervisord.log", "pidfile": self._pid_file, "directory": stack.repo,
                "umask": "077", "identifier": "speck", **({"user": "root"} if os.getuid() == 0 else {}),
            },
            # For whoever knows `supervisorctl`.
            "supervisorctl": {"serverurl": f"unix://{self._socket}"},
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
            },
        }  # fmt: skip
        for name in stack.services:
            command = shlex.join([sys.executable, "-m", "infra.stack_service", str(stack.home), name])
            sections[f"program:{name}"] = {
                "command": command, "autorestart": "true", "startretries": NUM_RETRIES, "stopwaitsecs": STOP_WAIT_S,
                # PostgreSQL would wait for its clients.
                "stopsignal": "INT" if name == "postgres" else "TERM", "killasgroup": "true",
                "stdout_logfile": stack.logs / f"{name}.log", "redirect_stderr": "true",
            }  # fmt: skip
        lines: list[str] = []
        for title, settings in sections.items():
            # It expands %(names)s.
            lines += [f"[{title}]", *(f"{key}={str(value).replace('%', '%%')}" for key, value in settings.items()), ""]
        return "\n".join(lines)

"""Runs one command and ends it with all its descendants, also when the process that asked for it is killed.

Started by path (`python guard.py PARENT_PID COMMAND...`) in a session of its own; standard library only. Linux ends
every descendant, also those in sessions of their own, such as Prefect's flow runs; elsewhere the process group ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 10.0


def main(arguments: Sequence[str]) -> None:
    """Waits for the command, or for SIGTERM, which also arrives when the parent dies; then ends what is left."""
    parent, command = int(arguments[0]), arguments[1:]
    signal.signal(signal.SIGTERM, _stop)
    # A handler, not SIG_IGN: the command would inherit that, and a Prefect worker forwards SIGTERM as SIGINT.
    signal.signal(signal.SIGINT, lambda *_: None)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        return
    child = subprocess.Popen(command)
    with contextlib.suppress(SystemExit):
        child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    # The children of a killed child become ours: until none is left.
    while children := _children():
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    os.killpg(0, signal.SIGKILL)


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command, in brackets, may hold anything; state and parent follow it.
            if stat.read_text().rpartition(")")[2].split()[1] == own:
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])

"""Runs one command as a process group that ends as a whole, also when the process that asked for it is killed.

Started by path (`python guard.py PARENT_PID COMMAND...`) in a session of its own; standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
GRACE_S = 10.0


def main(arguments: Sequence[str]) -> None:
    """Waits for the command, or for SIGTERM, which also arrives when the parent dies; then ends the group."""
    parent, command = int(arguments[0]), arguments[1:]
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    child = subprocess.Popen(command)
    try:
        child.wait()
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main(sys.argv[1:])

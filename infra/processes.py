"""Processes of a stack: found by their mark, and what counts as alive.

One that has ended stays in the process table, as a zombie, until its parent asks for it. In a container whose first
process asks for nobody that is for ever, so a zombie is never waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from infra.stack import MARK

_POLL_S = 0.05


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def still_alive(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended after so long; returns as soon as there are none."""
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return alive


def marked(mark: str) -> list[psutil.Process]:
    """Living processes whose MARK begins so, and their descendants: Ray's hide their environment. Not this one."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK, "").startswith(mark):
                found |= {process, *process.children(recursive=True)}
    return sorted(filter(is_alive, found), key=lambda process: process.pid)


def kill_marked(mark: str, timeout_s: float) -> list[psutil.Process]:
    """SIGKILL to all that bear the mark; returns those that have not ended after so long."""
    left = marked(mark)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return still_alive(left, timeout_s)

"""Finding, watching and killing processes that a test started, and no others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

import psutil

from infra.processes import is_alive

MARK = "SPECK_TEST_MARK"
# Limits are written for two idle cores. A machine that is busy elsewhere is several times slower, and no test measures.
PATIENCE = 4


def new_mark() -> str:
    """A value for the environment variable MARK: all descendants of a process that has it can be found by it."""
    return uuid4().hex


def marked(mark: str, naming: str = "") -> list[psutil.Process]:
    """Living processes whose environment carries the mark and whose command line holds `naming`, except this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_other = process.pid != os.getpid() and is_alive(process)
            if is_other and process.environ().get(MARK) == mark and naming in " ".join(process.cmdline()):
                found.append(process)
    return found


def described(processes: list[psutil.Process]) -> list[str]:
    """Command lines of those that still live, for messages."""
    lines = []
    for process in processes:
        with suppress(psutil.Error):
            lines.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
    return lines


def left_after(mark: str, timeout_s: float) -> list[str]:
    """Waits until no marked process lives; returns those that outlived the timeout by far, and kills them."""
    deadline = time.monotonic() + PATIENCE * timeout_s
    while (processes := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = described(processes)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    return lines


def wait_until(condition: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.02) -> None:
    """Returns as soon as the condition holds; raises TimeoutError naming `what` when it is late by far."""
    deadline = time.monotonic() + PATIENCE * timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE * timeout_s:.0f} s")
        time.sleep(every_s)

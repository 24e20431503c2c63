from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from training.watchdog import HUNG_EXIT_CODE, Watchdog

HANGING = """
import threading, time
from training.watchdog import Watchdog

def wait_for_the_others():
    threading.Event().wait()

with Watchdog(1.0, "worker 3") as watchdog:
    for _ in range(8):
        time.sleep(0.3)
        watchdog.alive()
    print("hangs", flush=True)
    wait_for_the_others()
"""


def test_a_process_that_hangs_says_where_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == HUNG_EXIT_CODE, done.stderr
    hangs, told = done.stdout.splitlines()
    assert hangs == "hangs", "progress kept it alive for longer than its patience"
    assert told.startswith("[speck] error: worker 3 made no progress for 1 s")
    assert "in wait_for_the_others" in done.stderr
    assert "most recent call first" in done.stderr


def test_a_block_that_ended_is_watched_no_more() -> None:
    with Watchdog(0.2, "worker 0"):
        pass
    time.sleep(1.0)
    assert threading.current_thread().is_alive(), "this process would have ended"

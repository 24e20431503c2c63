"""Ends a process that makes no progress, and says where it hangs: a hanging worker holds up all others for ever."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from types import TracebackType
from typing import Self

from training.say import ERROR_MARK, say_line

# Neither a signal's nor Python's own.
HUNG_EXIT_CODE = 75


class Watchdog:
    """Within a `with` block, ends this process when `alive` was not called for `patience_s`, after a dump of all
    stacks.
    """

    def __init__(self, patience_s: float, who: str) -> None:
        self._patience_s, self._who = patience_s, who
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self.alive()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more: what follows may take as long as it likes."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(self._patience_s / 4, 5.0)):
            if time.monotonic() - self._last > self._patience_s:
                say_line(
                    f"{ERROR_MARK} {self._who} made no progress for {self._patience_s:.0f} s "
                    "(compute.hang_timeout_s) and is ended; where it hangs stands in the job's output"
                )
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(HUNG_EXIT_CODE)

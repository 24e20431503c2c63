"""What the surroundings ask of a training while it runs; all workers agree on it within the step's all-reduce."""

from __future__ import annotations

import signal
import threading
from typing import NamedTuple

_leaving = threading.Event()


class Asked(NamedTuple):
    """`checkpoint`: write one now. `leave`: this worker is taken away. `stop`: the run is to end here."""

    checkpoint: bool = False
    leave: bool = False
    stop: bool = False


def leave_on_sigterm() -> None:
    """From now on SIGTERM asks the training in this process to leave: it keeps a checkpoint first.

    In the main thread.
    """
    signal.signal(signal.SIGTERM, lambda *_: _leaving.set())


def is_leaving() -> bool:
    """Whether SIGTERM came."""
    return _leaving.is_set()


def stop_name(number: int) -> str:
    """The object in a run whose being there asks an attempt to stop."""
    return f"stop/{number:03d}"

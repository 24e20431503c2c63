"""One voice: what a flow tells people goes to Prefect's log, and plainly to the terminal when there is one."""

from __future__ import annotations

import os
from typing import TextIO

_terminals: list[TextIO] = []


def plain_terminal(stream: TextIO) -> None:
    """Print our lines on `stream` as they are; Prefect's own go to its log alone. Call before prefect is imported."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    _terminals[:] = [stream]


def say(message: str) -> None:
    """Log a line of the current flow or task run."""
    from prefect import get_run_logger

    get_run_logger().info(message)
    _print(message)


def log(message: str) -> None:
    """Log a line of the current flow or task run that is of no interest on the terminal."""
    from prefect import get_run_logger

    get_run_logger().info(message)


def warn(message: str) -> None:
    """Log a warning of the current flow or task run."""
    from prefect import get_run_logger

    get_run_logger().warning(message)
    _print(f"warning: {message}")


def _print(message: str) -> None:
    for stream in _terminals:
        print(message, file=stream, flush=True)

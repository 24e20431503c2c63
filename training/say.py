"""What a job says to the people who follow it."""

from __future__ import annotations

# Starts every line that is meant for them.
PROGRESS_MARK = "[speck]"
ERROR_MARK = "error:"


def say_line(message: str) -> None:
    """Print a line for them, at once."""
    print(f"{PROGRESS_MARK} {message}", flush=True)

"""A lease on a run key: of all flows that share a storage, one at a time works on a cell."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from training.checkpoint import write_json

RENEW_EVERY_S = 10.0
# Measured on the clock of whoever waits: clocks of different machines need not agree.
EXPIRES_AFTER_S = 60.0
POLL_S = 0.5


class LeaseLost(RuntimeError):
    """Another flow took the lease over, because this one had not renewed it in time."""


class Lease:
    """A held lease, renewed in the background until it is released."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content
        self._released, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {path.stem}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost if somebody else holds it now."""
        if self._lost.is_set():
            raise LeaseLost(f"{self._path.stem}: this flow stood still for over {EXPIRES_AFTER_S:.0f} s; run again")

    def release(self) -> None:
        """Give it up."""
        self._released.set()
        self._thread.join()
        if _owner(_read(self._path)) == self._content["owner"]:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_EVERY_S):
            with suppress(OSError):  # A storage that is away for a moment: the next renewal counts.
                if _owner(_read(self._path)) != self._content["owner"]:
                    self._lost.set()
                    return
                self._content["renewals"] += 1
                write_json(self._path, self._content)


@contextmanager
def lease(storage: Path, run_key: str, say: Callable[[str], None], check_stop: Callable[[], None]) -> Iterator[Lease]:
    """Hold the lease of `run_key` for the length of this block, waiting for it as long as another flow holds it.

    A lease is taken over when its process is gone from this machine, or when nobody renewed it for EXPIRES_AFTER_S.
    `check_stop` is called while waiting; what it raises ends the wait.
    """
    path = storage.parent / "leases" / f"{run_key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {
        "owner": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid(),
        "process_started": psutil.Process().create_time(), "renewals": 0,
    }  # fmt: skip
    seen: dict[str, Any] | None = None
    since = time.monotonic()
    told = False
    while not _create(path, mine):
        check_stop()
        current = _read(path)
        if current != seen:
            seen, since = current, time.monotonic()
        if seen is not None and (_is_dead(seen) or time.monotonic() - since > EXPIRES_AFTER_S):
            if _take_over(path, seen, mine):
                break
        elif seen is not None and not told:
            say(f"waiting: process {seen.get('pid')} on {seen.get('host')} is at work on {run_key}")
            told = True
        else:
            time.sleep(POLL_S)
    held = Lease(path, mine)
    try:
        yield held
    finally:
        held.release()


def _create(path: Path, content: dict[str, Any]) -> bool:
    # Linked into place whole: of two flows one wins, and nobody reads half a lease.
    draft = path.with_name(f".{content['owner']}.draft")
    write_json(draft, content)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _take_over(path: Path, expired: dict[str, Any], content: dict[str, Any]) -> bool:
    """Put our lease in the place of an expired one, unless that was renewed or taken over meanwhile.

    The path is never free on the way: nobody can create a lease beside ours.
    """
    with FileLock(path.parent / ".takeover"):
        if _read(path) != expired:
            return False
        write_json(path, content)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """The lease, None if there is none; a damaged one is nobody's, and expires."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _owner(content: dict[str, Any] | None) -> str | None:
    return None if content is None else content.get("owner")


def _is_dead(content: dict[str, Any]) -> bool:
    """True if the holder ran on this machine and is gone; its process id may be another's by now."""
    if content.get("host") != platform.node():
        return False
    try:
        return bool(psutil.Process(content["pid"]).create_time() != content["process_started"])
    except psutil.NoSuchProcess:
        return True

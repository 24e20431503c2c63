"""A lease on a name, such as a run key: of all flows that share a storage, one at a time works on it."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from training.checkpoint import write_json

RENEW_EVERY_S = 10.0
# Measured on the clock of whoever waits: clocks of different machines need not agree.
EXPIRES_AFTER_S = 60.0
POLL_S = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Of /proc/PID/stat, among what follows the name: proc_pid_stat(5) counts them as 3 and 22.
_STATE, _START_TIME = 0, 19


class LeaseLost(RuntimeError):
    """Another flow took the lease over, because this one had not renewed it in time."""


class Busy(RuntimeError):
    """Somebody else holds the lease and is alive; `holder` is what the lease says."""

    def __init__(self, holder: Mapping[str, Any]) -> None:
        self.holder = holder
        super().__init__(f"process {holder.get('pid')} on {holder.get('host')} is at work")


class Lease:
    """A held lease, renewed in the background until it is released.

    `dead`: what the lease said of the holder that it was taken from, who had not released it.
    """

    def __init__(self, path: Path, content: dict[str, Any], dead: Mapping[str, Any] | None) -> None:
        self._path, self._content, self.dead = path, content, dead
        self._released, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {path.stem}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost if somebody else holds it now."""
        with suppress(OSError):
            # After this process stood still, the thread that renews may not have looked yet.
            if not self._is_ours():
                self._lost.set()
        if self._lost.is_set():
            raise LeaseLost(f"{self._path.stem}: this flow stood still for over {EXPIRES_AFTER_S:.0f} s; run again")

    def release(self) -> None:
        """Give it up."""
        self._released.set()
        self._thread.join()
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        return bool(_owner(_read(self._path)) == self._content["owner"])

    def _renew(self) -> None:
        while not self._released.wait(RENEW_EVERY_S):
            with suppress(OSError):  # A storage that is away for a moment: the next renewal counts.
                if not self._is_ours():
                    self._lost.set()
                    return
                self._content["renewals"] += 1
                write_json(self._path, self._content)


@contextmanager
def lease(
    storage: Path,
    name: str,
    say: Callable[[str], None],
    check_stop: Callable[[], None],
    *,
    patient: bool = True,
    about: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Lease]:
    """Hold the lease of `name` for the length of this block, waiting for it as long as another flow holds it.

    A lease is taken over when its process is gone from this machine or container, or when nobody renewed it for
    EXPIRES_AFTER_S. `check_stop` is called while waiting; what it raises ends the wait. `about` stands in the lease
    for others to read.

    Raises:
        Busy: not `patient`, and the other flow is alive: a process of this machine, or it renewed the lease meanwhile.
    """
    path = storage.parent / "leases" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {**about, "owner": uuid.uuid4().hex, **this_process(), "renewals": 0}
    seen: dict[str, Any] | None = None
    dead: dict[str, Any] | None = None
    since = time.monotonic()
    told = False
    while not _create(path, mine):
        check_stop()
        current = _read(path)
        renewed = bool(seen) and bool(current) and _owner(seen) == _owner(current) and seen != current
        if current != seen:
            seen, since = current, time.monotonic()
        if seen is not None and (is_dead(seen) or time.monotonic() - since > EXPIRES_AFTER_S):
            if _take_over(path, seen, mine):
                dead = seen
                break
        elif seen and not patient and (renewed or seen.get("place") == _place()):
            raise Busy(seen)
        elif seen is not None and not told:
            say(f"waiting: process {seen.get('pid')} on {seen.get('host')} is at work on {name}")
            told = True
        else:
            time.sleep(POLL_S)
    held = Lease(path, mine, dead)
    try:
        yield held
    finally:
        held.release()


def dead_leases(storage: Path) -> list[Path]:
    """Leases whose holder ran on this machine and is gone; who comes next takes them over."""
    found = sorted((storage.parent / "leases").glob("*.json"))
    return [path for path in found if (content := _read(path)) and is_dead(content)]


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


def this_process() -> dict[str, Any]:
    """What tells this process from all others, by which `is_dead` knows later whether it is gone."""
    pid = os.getpid()
    return {"host": platform.node(), "place": _place(), "pid": pid, "process_started": _started(pid)}


def is_dead(content: Mapping[str, Any]) -> bool:
    """True if the holder ran where this process runs and is gone; its process id may be another's by now."""
    return content.get("place") == _place() and _started(content["pid"]) != content["process_started"]


def _place() -> str:
    """Where process ids mean what they mean here: this boot of this machine, and in it this container or none.

    A name would not do: containers that share their machine's network have its name, and machines are cloned.
    """
    return f"{_BOOT_ID.read_text(encoding='utf-8').strip()} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot, which do not move when the clock is set; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    # One that ended keeps its line until its parent asks for it, and some containers have nobody who does.
    return None if fields[_STATE] in "ZX" else fields[_START_TIME]

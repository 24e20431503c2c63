"""What ended a group of workers, and whether they are started again: decided by what it was and how often it came.

Ray's own retries are off: they start again what comes again every time, and do not know that less memory would do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import PreemptionError

from data.decode import TooManyUnreadable
from data.objects import SourceUnavailable, StoreError
from training.errors import Diverged, MiscountedImages, Preempted
from training.spec import RunSpec
from training.store import StorageFull

MAX_PREEMPTIONS = 50
# Each halves what a worker has in memory of its batch: after four it is a sixteenth.
MAX_HALVINGS = 4
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
# Workers that lived for so long were not hit by what hit those before them.
LONG_S = 600.0
MAX_CAUSE_CHARACTERS = 400

# Of no use to start again: ours, and what Python itself calls a mistake of the program or of its input.
_DETERMINISTIC = (
    Diverged, TooManyUnreadable, StoreError, StorageFull, MiscountedImages, InsufficientClusterResourcesError,
    ValueError, TypeError, LookupError, AttributeError, NameError, ImportError, AssertionError, ArithmeticError,
    NotImplementedError, FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
_OUT_OF_MEMORY = (OutOfMemoryError, MemoryError)
# Of a kernel's kill Ray only says that memory may have been the reason, so `OOM` is not looked for.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|_ALLOC_FAILED|NODE_OUT_OF_MEMORY", re.I
)
_NODE_LOST = "its node has died"
_PEER_LOST = re.compile(
    r"gloo|NCCL|TCPStore|ProcessGroup|connection (closed|reset|refused)|broken pipe|timed out waiting", re.I
)

Kind = Literal["deterministic", "out_of_memory", "preempted", "failure"]
_BY_WEIGHT: tuple[Kind, ...] = ("deterministic", "out_of_memory", "preempted", "failure")


@dataclass(frozen=True)
class Failure:
    """What ended a group of workers that had lived for `lived_s`; `cause` says it in a line."""

    kind: Kind
    cause: str
    lived_s: float = 0.0


@dataclass(frozen=True)
class Retry:
    """Start again after `pause_s`, each worker's share of a batch in so many parts; `told` says why and what for."""

    pause_s: float
    accumulation: int
    told: str


@dataclass(frozen=True)
class GiveUp:
    """Do not start again."""

    told: str


def classify(error: TrainingFailedError, lived_s: float = 0.0) -> Failure:
    """What ended the workers. When one goes, the others lose their connection to it: that is a cause only where
    there is no other.
    """
    errors = list(_raised(error))
    causes = [(where, one) for where, one in errors if not is_peer_lost(one)] or errors
    kinds = [_kind(one) for _, one in causes]
    kind = min(kinds, key=_BY_WEIGHT.index)
    where, cause = causes[kinds.index(kind)]
    return Failure(kind, f"{where}{_in_a_line(cause)}", lived_s)


def decide(history: Sequence[Failure], spec: RunSpec) -> Retry | GiveUp:
    """What to do after the last of all failures so far."""
    latest = history[-1]
    count = sum(failure.kind == latest.kind for failure in history)
    halvings = sum(failure.kind == "out_of_memory" for failure in history)
    parts = spec.training.accumulation * 2**halvings
    limit, told = _limit(latest.kind, spec)
    if count > limit:
        return GiveUp(told)
    quick = list(takewhile(lambda failure: failure.lived_s < LONG_S, reversed(history)))
    pause_s = min(FIRST_PAUSE_S * 2 ** max(len(quick) - 1, 0), MAX_PAUSE_S)
    return Retry(pause_s, parts, f"{_again(latest.kind, parts)} ({count} of {limit})")


def _limit(kind: Kind, spec: RunSpec) -> tuple[int, str]:
    """How often this may happen, and what to say when it has happened more often."""
    if kind == "deterministic":
        return 0, "not started again: it would happen again"
    if kind == "preempted":
        return MAX_PREEMPTIONS, f"given up after {MAX_PREEMPTIONS} lost machines; run it again to go on"
    if kind == "failure":
        allowed = spec.compute.max_failures
        return allowed, f"given up: {allowed} new starts after failures are allowed (compute.max_failures)"
    share = math.ceil(spec.training.batch_size / spec.compute.max_workers)
    halvings = min(MAX_HALVINGS, max(0, math.ceil(math.log2(share / spec.training.accumulation))))
    remedy = "lower training.input_size_px or take workers with more memory"
    return (
        halvings,
        f"given up: too little memory for a batch in {2**halvings * spec.training.accumulation} parts; {remedy}",
    )


def _again(kind: Kind, parts: int) -> str:
    if kind == "preempted":
        return "a machine was lost, starting again"
    if kind == "failure":
        return "starting again after a failure"
    return (
        f"out of memory, starting again with each worker's share of a batch in {parts} parts: the same batch, but "
        "batch normalisation sees less of it at a time, so its statistics change"
    )


def is_peer_lost(error: BaseException) -> bool:
    """True if all that a worker knows is that another one, or the way to it, is gone."""
    if isinstance(error, ActorUnavailableError | ConnectionError):
        return True
    # Torch's own class, by its name: what judges a training does so without torch, which takes seconds to import.
    if "DistError" in {one.__name__ for one in type(error).__mro__}:
        return True
    # Torch raises plain ones for Gloo.
    return type(error) is RuntimeError and _PEER_LOST.search(str(error)) is not None and not _is_memory(error)


def is_node_lost(error: BaseException) -> bool:
    """True if a worker's machine went down or does not answer, or is about to be taken away."""
    if isinstance(error, PreemptionError | Preempted | NodeDiedError | ActorUnavailableError):
        return True
    return isinstance(error, RayActorError) and (error.preempted or _NODE_LOST in str(error))


def unwrapped(error: BaseException) -> BaseException:
    """What was raised, without what Ray puts around it on the way."""
    while True:
        inner: object = None
        if isinstance(error, UserExceptionWithTraceback):
            inner = error._base_exc
        elif isinstance(error, WorkerHealthCheckFailedError):
            inner = error.health_check_failure
        elif isinstance(error, ControllerError):
            inner = error.controller_failure
        elif isinstance(error, RayTaskError):
            inner = error.cause
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _raised(error: TrainingFailedError) -> Iterator[tuple[str, BaseException]]:
    """Each error with where it was, for people."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        for rank, one in sorted(error.worker_failures.items()):
            yield f"worker {rank}: ", unwrapped(one)
    else:
        yield "", unwrapped(error)


def _kind(error: BaseException) -> Kind:
    # Machines that were there a moment ago are gone, or taken.
    starting = isinstance(error, WorkerGroupStartupFailedError) and _NODE_LOST in str(error)
    if is_node_lost(error) or starting or isinstance(error, WorkerGroupStartupTimeoutError):
        return "preempted"
    if _is_memory(error):
        return "out_of_memory"
    if isinstance(error, _DETERMINISTIC) and not isinstance(error, SourceUnavailable):
        return "deterministic"
    return "failure"


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, _OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError | RayActorError) and _NO_MEMORY.search(str(error)) is not None
    )


def _in_a_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, RayActorError):
        # Ids come first; what happened is said from the last line on that begins with it.
        ip = re.search(r"^\s*ip: (\S+)", text, re.M)
        text = text[max(text.rfind("\nThe actor"), 0) :] + (f" (on {ip[1]})" if ip else "")
    line = " ".join(text.split()) or repr(error)
    name = "" if isinstance(error, RayActorError) else f"{type(error).__name__}: "
    return name + (line if len(line) <= MAX_CAUSE_CHARACTERS else f"{line[:MAX_CAUSE_CHARACTERS]}...")

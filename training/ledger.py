"""What a run held of the machines, how much of that was of use, and what it cost.

Every start of a worker group has a record beside the journal, `ledger/<attempt>-<started_ms>.json`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from training.checkpoint import json_bytes
from training.machines import Node
from training.records import RESULT, Attempt, JournalEntry, RunResult, read_journal
from training.store import FolderStore, RunStore, StorageUnavailable

LEDGER = "ledger"
# The end of a group that was killed is known to within this.
REFRESH_S = 30.0


class Usage(BaseModel):
    """One start of a worker group, which rank 0 knows to have lived from `started_ms` to `last_ms`.

    `resumed_step`: where in training it began, None until that is known; `resumed_s`: how long the epoch under way had
    taken there, 0 between epochs. `price_per_hour`: of a worker's GPU, or of its CPU where it has no GPU. `nodes`: the
    machines, once the workers have told them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    attempt: int
    started_ms: int
    last_ms: int
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    price_per_hour: float | None = None
    resumed_step: int | None = None
    resumed_s: float = 0.0
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Account:
    """Accelerator-seconds of some starts: all that were held, and those of use; `price` if every start has one."""

    held_s: float
    useful_s: float
    num_starts: int
    price: float | None

    @property
    def wasted_s(self) -> float:
        """Starting, resuming, writing artifacts, and work that a kill undid."""
        return self.held_s - self.useful_s

    @property
    def useful_share(self) -> float:
        """0..1."""
        return self.useful_s / self.held_s if self.held_s else 0.0


@dataclass(frozen=True)
class Ledger:
    """The accounts of a run: in all, of each attempt by its number, and of each start by time.

    Seconds are GPU-seconds if any start had GPUs, those without then count none, else CPU-seconds.
    """

    accelerator: Literal["CPU", "GPU"]
    total: Account
    attempts: Mapping[int, Account]
    starts: Sequence[Account]

    def as_json(self) -> dict[str, Any]:
        """Plain values, also of what follows from them."""
        attempts = {str(number): _plain(account) for number, account in self.attempts.items()}
        return {"accelerator": self.accelerator, "total": _plain(self.total), "attempts": attempts}


def _plain(account: Account) -> dict[str, Any]:
    return {**asdict(account), "wasted_s": account.wasted_s, "useful_share": account.useful_share}


def ledger_of(usages: Iterable[Usage], journal: Sequence[JournalEntry], scoring_s: float = 0.0) -> Ledger | None:
    """The accounts of all starts, None if there was none. By hand:

    - A start lasted from `started_ms` to `last_ms`, or to its last entry in the journal where that is later. It held
      workers x accelerators of a worker x so many seconds. Not in it: placing the group, and starting its processes.
    - Of use are the `seconds` of each epoch in the journal (training and validation), times the workers of the start
      that reported it, which is the latest one begun by then. If that start had resumed within the epoch, `resumed_s`
      of these seconds are of the start before that had come so far: of the latest one that had begun at an earlier
      step. `scoring_s`, the final scoring, is of the last start.
    - A price is that of the hours held.
    """
    starts = sorted(usages, key=lambda usage: usage.started_ms)
    if not starts:
        return None
    end_ms, useful_s = [usage.last_ms for usage in starts], [0.0] * len(starts)
    epoch_began = 0
    for entry in journal:
        for index, seconds in _by_start(entry, epoch_began, starts):
            useful_s[index] += seconds
        if (reporting := _begun_by(entry.timestamp_ms, starts)) >= 0:
            end_ms[reporting] = max(end_ms[reporting], entry.timestamp_ms)
        epoch_began = entry.step
    useful_s[-1] += scoring_s
    on_gpu = any(usage.gpus_per_worker for usage in starts)
    accounts = [
        _account(usage, end, useful, on_gpu) for usage, end, useful in zip(starts, end_ms, useful_s, strict=True)
    ]
    by_attempt: dict[int, list[Account]] = {}
    for usage, account in zip(starts, accounts, strict=True):
        by_attempt.setdefault(usage.attempt, []).append(account)
    attempts = {attempt: _sum(of_attempt) for attempt, of_attempt in sorted(by_attempt.items())}
    return Ledger("GPU" if on_gpu else "CPU", _sum(accounts), attempts, accounts)


def _by_start(entry: JournalEntry, epoch_began: int, starts: Sequence[Usage]) -> Iterator[tuple[int, float]]:
    """Indices of the starts that had a part in an epoch, the one that ended it first, and seconds of each."""
    index, seconds = _begun_by(entry.timestamp_ms, starts), entry.seconds
    while index >= 0:
        resumed_step = starts[index].resumed_step
        if resumed_step is None or not epoch_began < resumed_step <= entry.step:
            yield index, seconds
            return
        before_s = min(starts[index].resumed_s, seconds)
        yield index, seconds - before_s
        index, seconds = _latest_from_before(resumed_step, starts[:index]), before_s


def _begun_by(time_ms: int, starts: Sequence[Usage]) -> int:
    """Index of the latest start begun by then, -1 if none was."""
    return sum(usage.started_ms <= time_ms for usage in starts) - 1


def _latest_from_before(step: int, starts: Sequence[Usage]) -> int:
    """Index of the latest start that began training at an earlier step, -1 if none did."""
    began = [-1 if usage.resumed_step is None else usage.resumed_step for usage in starts]
    return max((index for index, first in enumerate(began) if 0 <= first < step), default=-1)


def _account(usage: Usage, end_ms: int, useful_s: float, on_gpu: bool) -> Account:
    lasted_s = (end_ms - usage.started_ms) / 1000
    accelerators = usage.workers * (usage.gpus_per_worker if on_gpu else usage.cpus_per_worker)
    priced = usage.workers * (usage.gpus_per_worker or usage.cpus_per_worker)
    price = None if usage.price_per_hour is None else usage.price_per_hour * priced * lasted_s / 3600
    # Clocks are set, and no second can be of use that was not held.
    return Account(accelerators * lasted_s, accelerators * min(useful_s, lasted_s), 1, price)


def _sum(accounts: Sequence[Account]) -> Account:
    prices = [account.price for account in accounts if account.price is not None]
    return Account(
        sum(account.held_s for account in accounts),
        sum(account.useful_s for account in accounts),
        sum(account.num_starts for account in accounts),
        sum(prices) if len(prices) == len(accounts) else None,
    )


def read_usages(records: RunStore | Path) -> list[Usage]:
    """The records of all starts, by attempt and time. Raises StorageUnavailable."""
    store = FolderStore(records) if isinstance(records, Path) else records
    usages = []
    for name in store.names(LEDGER):
        try:
            usages.append(Usage.model_validate_json(store.read(name)))
        except ValueError as error:
            warnings.warn(f"{name} is unreadable and left out: {error}", stacklevel=2)
    return usages


def read_ledger(records: RunStore | Path) -> Ledger | None:
    """The accounts of a run from its records, None if they tell of no start. Raises StorageUnavailable."""
    store = FolderStore(records) if isinstance(records, Path) else records
    usages = read_usages(store)
    try:
        scoring_s = RunResult.model_validate_json(store.read(RESULT)).seconds.get("score_test", 0.0)
    except (FileNotFoundError, ValueError):
        scoring_s = 0.0
    return ledger_of(usages, read_journal(store), scoring_s)


class UsageLog:
    """Writes the record of one start, at once and from then on; a storage that does not take it costs the record alone.

    One thread at a time.
    """

    def __init__(self, store: RunStore, attempt: Attempt, num_workers: int, say: Callable[[str], None]) -> None:
        compute, now_ms = attempt.spec.compute, _now_ms()
        self._store, self._say = store, say
        self._is_closed = False
        self._usage = Usage(
            attempt=attempt.number, started_ms=now_ms, last_ms=now_ms, workers=num_workers,
            cpus_per_worker=compute.cpus_per_worker, gpus_per_worker=compute.gpus_per_worker,
            price_per_hour=compute.price_per_hour,
        )  # fmt: skip
        self._write()

    def runs_on(self, nodes: Sequence[Node]) -> None:
        """The workers are on these machines."""
        self._usage = self._usage.model_copy(update={"nodes": tuple(nodes)})
        self._write()

    def resumed(self, step: int, seconds: float) -> None:
        """Training begins at this step, in an epoch that has taken so long."""
        self._usage = self._usage.model_copy(update={"resumed_step": step, "resumed_s": seconds})
        self._write()

    def refresh(self, *, at_once: bool = False) -> None:
        """Write it again, unless `at_once` only if that was not done for REFRESH_S."""
        if at_once or _now_ms() - self._usage.last_ms > REFRESH_S * 1000:
            self._write()

    def close(self) -> None:
        """Write it a last time; nothing is written from here on."""
        if not self._is_closed:
            self._write()
        self._is_closed = True

    def _write(self) -> None:
        self._usage = self._usage.model_copy(update={"last_ms": max(_now_ms(), self._usage.last_ms)})
        name = f"{LEDGER}/{self._usage.attempt:03d}-{self._usage.started_ms}.json"
        try:
            self._store.write(name, json_bytes(self._usage.model_dump(mode="json")))
        except StorageUnavailable as error:
            self._say(f"the ledger waits: {error}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

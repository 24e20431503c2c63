"""Where the time of a training step goes, as shares of the whole."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.sync_batch_norm import taken_exchange_s

PARTS = ("data_wait", "transfer", "forward", "assignment", "backward", "all_reduce", "optimizer", "report")
# Marks on a GPU are read when this many wait: reading waits for the last of them.
_MARKS_PER_READING = 512

T = TypeVar("T")


class StepClock:
    """Adds up the seconds of each of PARTS. `lap(part)` says what the time since the last lap was spent on.

    On a GPU the marks are events in its stream, so that nothing waits for it; waiting for data is the host's time, in
    which the GPU may still be busy with the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._on_gpu = device.type == "cuda"
        self._last: float | torch.cuda.Event = 0.0
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        taken_exchange_s()
        self.start()

    def start(self) -> None:
        """Begin a lap here."""
        self._last = self._now()

    def lap(self, part: str) -> None:
        """What has passed since the last lap or `start` was spent on `part`."""
        now = self._now()
        if isinstance(self._last, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
            self._marks.append((part, self._last, now))
            if len(self._marks) >= _MARKS_PER_READING:
                self._read()
        elif isinstance(self._last, float) and isinstance(now, float):
            self.seconds[part] += now - self._last
        self._last = now

    def waited(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches, and how long each was waited for."""
        iterator = iter(loader)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self.seconds["data_wait"] += time.perf_counter() - started
            if batch is None:
                return
            self.start()
            yield batch

    def shares(self, parallel: nn.Module, num_steps: int, total_s: float) -> dict[str, float]:
        """Shares of `total_s` as metrics `share/...`.

        What forward and backward spend on other workers is all_reduce; on a GPU that of batch normalisation stays where
        it is, for nobody times it there.
        """
        self._read()
        seconds = dict(self.seconds)
        for part, exchange_s in taken_exchange_s().items():
            gradients_s = _waiting_s_per_step(parallel) * num_steps if part == "backward" else 0.0
            waiting_s = min(exchange_s + gradients_s, seconds[part])
            seconds[part] -= waiting_s
            seconds["all_reduce"] += waiting_s
        return {f"share/{part}": value / max(total_s, 1e-9) for part, value in seconds.items()}

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        if self._marks:
            self._marks[-1][2].synchronize()
        for part, before, after in self._marks:
            self.seconds[part] += before.elapsed_time(after) / 1000
        self._marks.clear()


def _waiting_s_per_step(parallel: nn.Module) -> float:
    """Of a step, the seconds in which gradients travel and nothing is computed, as DDP samples them."""
    if not isinstance(parallel, DistributedDataParallel):
        return 0.0
    sampled: dict[str, int] = parallel._get_ddp_logging_data()
    nanoseconds = sampled.get("avg_backward_comm_time", 0) - sampled.get("avg_backward_compute_comm_overlap_time", 0)
    return max(0.0, nanoseconds / 1e9)

"""What the machines were doing while a model trained: CPU, memory, GPU, as metrics named `system/...`."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

# Memory and GPUs are looked at this often; in between a reading is a mean.
SAMPLE_EVERY_S = 10.0
# Of this container, by the version of control groups, and of the machine.
_KILL_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")


class SystemMeter:
    """Watches this node in a thread until it is closed."""

    def __init__(self) -> None:
        self._process, self._cpu = psutil.Process(), psutil.cpu_times()
        self._sums, self._counts = Counter[str](), Counter[str]()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system meter", daemon=True)
        self._thread.start()

    def read(self) -> dict[str, float]:
        """Means since the last reading: CPU share and memory of the node, memory of this process, each GPU's use."""
        self._sample()
        with self._lock:
            means = {name: self._sums[name] / count for name, count in self._counts.items()}
            self._sums.clear()
            self._counts.clear()
        before, self._cpu = self._cpu, psutil.cpu_times()
        spent = [now - then for now, then in zip(self._cpu, before, strict=True)]
        idle = sum(getattr(self._cpu, name, 0.0) - getattr(before, name, 0.0) for name in ("idle", "iowait"))
        return {"system/cpu_percent": 100 * max(0.0, 1 - idle / sum(spent)) if sum(spent) > 0 else 0.0} | means

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(SAMPLE_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        memory = psutil.virtual_memory()
        values = {
            "system/memory_used_gib": (memory.total - memory.available) / 2**30,
            "system/process_memory_gib": self._process.memory_info().rss / 2**30,
        } | _gpus()
        with self._lock:
            self._sums.update(values)
            self._counts.update(values.keys())


def by_node(readings: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Readings of nodes by their number as one: those of all nodes but 0 are called `system/node_<number>/...`."""
    named: dict[str, float] = {}
    for number, reading in readings:
        prefix = "system/" if number == 0 else f"system/node_{number}/"
        named |= {prefix + name.removeprefix("system/"): value for name, value in reading.items()}
    return named


def _gpus() -> dict[str, float]:
    import pynvml

    readings: dict[str, float] = {}
    # No GPU; or one that does not say, such as a part of one.
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            with suppress(pynvml.NVMLError):
                readings[f"system/gpu{index}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            with suppress(pynvml.NVMLError):
                readings[f"system/gpu{index}_memory_gib"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
    return readings


def num_killed_for_memory() -> int:
    """A count that grows when the kernel kills a process here because memory ran out; 0 where it does not say.

    The counters overlap, and a group's own may leave out what happens in groups below it: only growth means anything.
    """
    total = 0
    for path in _KILL_COUNTERS:
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", Path(path).read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total

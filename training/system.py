"""What the machine was doing while a model trained: CPU, memory, GPU, as metrics named `system/...`."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import psutil

# Of this container, by the version of control groups, and of the machine.
_KILL_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")


class SystemMeter:
    """Reads this node's load since the last reading."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._process = psutil.Process()

    def read(self) -> dict[str, float]:
        """CPU share and memory of the node and of this process; GPU use where there is one."""
        memory = psutil.virtual_memory()
        return {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_used_gib": (memory.total - memory.available) / 2**30,
            "system/process_memory_gib": self._process.memory_info().rss / 2**30,
        } | _gpus()


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

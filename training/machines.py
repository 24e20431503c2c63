"""What a training runs on: the packages of its workers' environment, and the machines of its group."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

_CPU_INFO = Path("/proc/cpuinfo")


class Gpu(BaseModel):
    """One GPU of a node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_gib: float


class Node(BaseModel):
    """One machine of a group of workers. `num_cpus` as the system counts them, `num_usable_cpus` by these workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    host: str
    system: str
    cpu: str
    num_cpus: int
    num_usable_cpus: int
    memory_gib: float
    gpus: tuple[Gpu, ...] = ()


def node_number() -> int:
    """This worker's node, from 0, as torchrun calls it."""
    return int(os.environ.get("GROUP_RANK", "0"))


def is_first_on_node() -> bool:
    """Whether this worker speaks for its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_only_node() -> bool:
    """Whether all workers of the group are on this one."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def this_node() -> Node:
    """The machine of this worker."""
    return Node(
        number=node_number(),
        host=platform.node(),
        system=platform.platform(),
        cpu=_cpu_model(),
        num_cpus=psutil.cpu_count() or 1,
        num_usable_cpus=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=_gpus(),
    )


def in_words(nodes: Sequence[Node]) -> str:
    """The machines in a line: equal ones are counted."""
    kinds = [_kind(node) for node in nodes]
    return "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def _kind(node: Node) -> str:
    names = [gpu.name for gpu in node.gpus]
    gpus = [f"{names.count(name)} GPU {name}" for name in dict.fromkeys(names)]
    return ", ".join([f"{node.num_usable_cpus} CPUs {node.cpu}", f"{node.memory_gib:g} GiB", *gpus])


def environment_lock() -> str:
    """The exact packages of this process's environment, a line `name==version` each, after the interpreter's own.

    Where a package came from is not told: that may be an address with a password in it, or a path of this machine.
    """
    versions: dict[str, str] = {}
    for found in distributions():
        # Of a package that is there twice, the first is imported.
        versions.setdefault((found.metadata["Name"] or "").lower().replace("_", "-"), found.version)
    interpreter = f"# {platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    return "\n".join([interpreter, *(f"{name}=={versions[name]}" for name in sorted(versions) if name)]) + "\n"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in _CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    import pynvml

    found = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory_gib = round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1)
            found.append(Gpu(name=str(pynvml.nvmlDeviceGetName(handle)), memory_gib=memory_gib))
    return tuple(found)

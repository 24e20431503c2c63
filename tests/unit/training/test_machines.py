"""What is put on record of a training's environment and machines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import psutil
import pytest

from training import machines
from training.machines import (
    Gpu,
    Node,
    environment_lock,
    in_words,
    is_first_on_node,
    is_only_node,
    node_number,
    this_node,
)

NODE = Node(number=0, host="a", system="Linux", cpu="Fast 9000", num_cpus=8, num_usable_cpus=4, memory_gib=31.5)


def test_the_lock_names_every_installed_package_with_its_exact_version_and_no_place() -> None:
    first, *lines = environment_lock().splitlines()
    assert first.startswith(f"# CPython {platform.python_version()} on ")
    found = dict(line.split("==") for line in lines)
    assert [*found] == sorted(found)
    for name in ("torch", "numpy", "pycocotools", "ray", "mlflow"):
        assert found[name] == importlib.metadata.version(name)
    assert not [line for line in lines if re.search(r"[/@ ]", line)]


def test_a_node_tells_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    node = this_node()
    assert (node.number, node.host, node.num_cpus) == (0, platform.node(), os.cpu_count())
    assert node.num_usable_cpus == len(psutil.Process().cpu_affinity())
    assert node.memory_gib == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, abs=0.1)
    assert Node.model_validate_json(node.model_dump_json()) == node
    monkeypatch.setattr(machines, "_CPU_INFO", Path("/nonexistent"))
    assert this_node().cpu


def test_nodes_are_numbered_as_torchrun_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (node_number(), is_first_on_node(), is_only_node()) == (0, True, True)
    environment = {"GROUP_RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (node_number(), is_first_on_node(), is_only_node()) == (3, False, False)


def test_equal_machines_are_counted() -> None:
    gpu = Gpu(name="Big", memory_gib=139.0)
    nodes = [NODE, NODE.model_copy(update={"number": 1, "host": "b"}), NODE.model_copy(update={"gpus": (gpu, gpu)})]
    assert in_words(nodes) == "2 x 4 CPUs Fast 9000, 31.5 GiB; 1 x 4 CPUs Fast 9000, 31.5 GiB, 2 GPU Big"
    assert in_words([]) == ""

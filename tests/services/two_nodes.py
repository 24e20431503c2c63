"""A Ray cluster of several nodes on one machine: each in a network namespace of its own, with an IP of its own.

    cables.bridge 10.x.y.1 (this process) -- 10.x.y.2 the head -- 10.x.y.3 a node -- ...

The namespaces reach each other and the bridge, and nothing else: they have no other route.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from chaos.processes import wait_until

from infra.servers import guarded
from training.cluster import Cluster, use_token

GCS_PORT, JOBS_PORT = 6379, 8265
# The name of the cable's end inside every namespace.
INTERFACE = "speck0"
START_S = 240.0
# A node that is gone is noticed within seconds, not half a minute.
FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


@cache
def namespaces_refused() -> str | None:
    """Why this machine gives no network namespaces, or None when it does."""
    if shutil.which("ip") is None:
        return "needs `ip` for network namespaces: apt-get install iproute2"
    probe = f"speck-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        entered = subprocess.run(["ip", "netns", "exec", probe, "true"], capture_output=True, text=True, check=False)
        _ip("netns", "delete", probe)
        made = entered
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as far as Ray can see: its namespace, its own address, its own disk."""

    name: str
    ip: str
    disk: Path

    def processes(self) -> list[int]:
        """Ids of all that runs on it."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()] if self._exists() else []

    def kill(self) -> None:
        """A power cut: the cable falls silent first, so that nobody gets a farewell, then everything is dead."""
        if self._exists():
            _ip("-netns", self.name, "link", "set", INTERFACE, "down")
        deadline = time.monotonic() + START_S
        while processes := self.processes():
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"{processes} on {self.name} do not die"
            time.sleep(0.05)

    def _exists(self) -> bool:
        return Path("/run/netns", self.name).exists()


@dataclass
class Nodes:
    """The living cluster. `head` carries its address, the job API and every job's driver."""

    folder: Path
    bridge: str
    subnet: ipaddress.IPv4Network
    environment: dict[str, str]
    _stack: ExitStack
    _all: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        """The head node; after `start_head` again, the newest one."""
        return next(node for node in reversed(self._all) if node.ip == str(self.subnet[2]))

    @property
    def workers(self) -> list[Node]:
        """The nodes beside the head that have not lost their power, oldest first."""
        return [node for node in self._all if node.ip != self.head.ip and node.processes()]

    @property
    def cluster(self) -> Cluster:
        """What a flow needs to know of it."""
        ip = self.subnet[2]
        return Cluster(f"{ip}:{GCS_PORT}", f"http://{ip}:{JOBS_PORT}")

    def start_head(self, num_cpus: int) -> Node:
        """Start the head; once more after it was killed, at the same address, knowing nothing of the cluster before."""
        return self._start(
            2, "--head", f"--port={GCS_PORT}", "--include-dashboard=true", f"--dashboard-host={self.subnet[2]}",
            f"--dashboard-port={JOBS_PORT}", num_cpus=num_cpus,
        )  # fmt: skip

    def add_node(self, num_cpus: int) -> Node:
        """Start one more node, at an address that none had before; returns when the head knows it."""
        return self._start(2 + len(self._all), f"--address={self.subnet[2]}:{GCS_PORT}", num_cpus=num_cpus)

    def keep_workers(self, count: int) -> None:
        """Add or kill nodes of one CPU until there are so many beside the head, and the head knows it."""
        for node in self.workers[count:]:
            node.kill()
        while len(self.workers) < count:
            self.add_node(num_cpus=1)
        expected = {self.head.ip, *(node.ip for node in self.workers)}
        wait_until(lambda: self.living() == expected, START_S, f"a cluster of {expected}", every_s=0.2)

    def announce_end(self, node: Node, deadline_s: int) -> None:
        """Tell the cluster, as a cloud does of a machine that it sells to somebody else, that the node is about to go.

        It is not killed for that.
        """
        (node_id,) = (one.node_id for one in self._listed() if one.node_ip == node.ip)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.cluster.address}",
            f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=sold",
            f"--deadline-remaining-seconds={deadline_s}",
        ]  # fmt: skip
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def _start(self, number: int, *arguments: str, num_cpus: int) -> Node:
        assert threading.current_thread() is threading.main_thread(), "what a thread starts dies with the thread"
        name = f"{self.bridge}-{len(self._all)}"
        node = Node(name, str(self.subnet[number]), self.folder / name)
        node.disk.mkdir()
        self._stack.enter_context(_connected(node, self.bridge, self.subnet.prefixlen, f"{name}-end"))
        self._all.append(node)
        # A path of a socket may have 107 characters.
        sockets = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))
        command = (
            "ip", "netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            f"--node-ip-address={node.ip}", f"--num-cpus={num_cpus}", f"--temp-dir={sockets}",
            "--object-store-memory=100000000", "--disable-usage-stats", *arguments,
        )  # fmt: skip
        environment = self.environment | {"SPECK_STORE": str(node.disk / "store")}
        log = node.disk / "ray.log"
        process = self._stack.enter_context(guarded(command, environment, log))
        self._stack.callback(node.kill)

        def is_up() -> bool:
            assert process.poll() is None, f"{name} ended: {log.read_text()}"
            return node.ip in self.living()

        wait_until(is_up, START_S, f"{name} at {node.ip}", every_s=0.2)
        return node

    def living(self) -> set[str]:
        """Addresses of the nodes that the head believes to be alive; none when it does not answer."""
        return {node.node_ip for node in self._listed() if node.state == "ALIVE"}

    def _listed(self) -> list[Any]:
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        try:
            return list(list_nodes(address=self.cluster.jobs_url, timeout=5))
        except RayStateApiException:
            return []


@contextmanager
def ray_nodes(folder: Path) -> Iterator[Nodes]:
    """A network without nodes; what is started in it ends with the block, and neither process nor cable stays.

    `folder` keeps each node's disk and log. The token is this process's own, for Ray reads it once a process.
    """
    use_token(folder)
    bridge = f"sp{random.SystemRandom().randrange(16**6):06x}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    with ExitStack() as stack:
        subnet = stack.enter_context(_bridge(bridge))
        yield Nodes(folder, bridge, subnet, kept | FAST_HEALTH_CHECKS, stack)
    left = [line for line in (_ip("netns", "list") + _ip("-brief", "link")).splitlines() if bridge in line]
    assert left == [], "namespaces or cables that outlived the cluster"


@contextmanager
def _bridge(name: str) -> Iterator[ipaddress.IPv4Network]:
    """A switch to which this process is connected at the first address of a free private network."""
    taken = [
        ipaddress.ip_network(f"{address['local']}/{address['prefixlen']}", strict=False)
        for link in json.loads(_ip("-4", "-json", "address"))
        for address in link.get("addr_info", ())
    ]
    candidates = random.SystemRandom().sample(list(ipaddress.ip_network("10.0.0.0/8").subnets(new_prefix=24)), 64)
    subnet = next(one for one in candidates if not any(one.overlaps(other) for other in taken))
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("address", "add", f"{subnet[1]}/{subnet.prefixlen}", "dev", name)
        _ip("link", "set", name, "up")
        yield ipaddress.IPv4Network(subnet)
    finally:
        _ip("link", "delete", name)


@contextmanager
def _connected(node: Node, bridge: str, prefix: int, cable: str) -> Iterator[None]:
    """The node's namespace, with a cable from its interface to the bridge."""
    _ip("netns", "add", node.name)
    try:
        _ip("link", "add", cable, "type", "veth", "peer", "name", INTERFACE, "netns", node.name)
        _ip("link", "set", cable, "master", bridge, "up")
        for device in ("lo", INTERFACE):
            _ip("-netns", node.name, "link", "set", device, "up")
        _ip("-netns", node.name, "address", "add", f"{node.ip}/{prefix}", "dev", INTERFACE)
        yield
    finally:
        node.kill()
        # Unacknowledged packets keep a namespace alive for minutes after its end, and with it the cable.
        _ip("link", "delete", cable)
        _ip("netns", "delete", node.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout

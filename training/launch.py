"""The Ray Train job around the loop: placement, and what is watched while the workers are at it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.meter import ERROR_MARK, PROGRESS_MARK
from training.records import Attempt
from training.retry import classify, is_node_lost, is_peer_lost, unwrapped
from training.run import leave_on_sigterm
from training.spec import ComputeSpec
from training.system import num_killed_for_memory
from training.worker import train_worker

# Workers notice at once that another one is gone; that its node is, the cluster says after missed health checks.
PEER_PATIENCE_S = 30.0
# For a last checkpoint, before the workers become more or fewer.
LEAVE_PATIENCE_S = 120.0
PROBE_S = 30.0


def build_trainer(attempt: Attempt, run_url: str, ray_folder: Path, *, accumulation: int) -> TorchTrainer:
    """A trainer of one attempt, which goes on from the newest checkpoint in the run's records."""
    return on_workers(
        train_worker,
        {"attempt": attempt.model_dump(mode="json"), "run_url": run_url, "accumulation": accumulation},
        attempt.spec.compute,
        ray_folder / attempt.run_key,
        [LeaveOnSigterm(), Overseer()],
    )


def on_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    compute: ComputeSpec,
    folder: Path,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """A Ray Train run of `worker(config)` on every worker; Ray keeps what it wants to remember in `folder`, here.

    Whatever ends the workers is raised by its `fit`: see `training.retry`.
    """
    on_gpu = compute.gpus_per_worker > 0
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    return TorchTrainer(
        worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            elastic_resize_monitor_interval_s=compute.resize_every_s,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            placement_strategy=compute.placement,
            accelerator_type=compute.accelerator,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            # Ray's own defaults for the last two are infinite.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            callbacks=[AtNodeAddress(), *callbacks],
        ),
    )


def see_nodes_anew() -> None:
    """Elastic workers are counted by a view of the nodes that may be from before one was lost."""
    # Here, because Ray Data is slow to import.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    with suppress(RayError):
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True), timeout=10)


class AtNodeAddress(WorkerCallback):
    """Has Gloo use the interface with the node's address: left alone it takes the one that the hostname stands for,
    which on many machines is the loopback.
    """

    def after_init_train_context(self) -> None:
        """Before the workers look for each other."""
        ip = ray.util.get_node_ip_address()
        for name, addresses in psutil.net_if_addrs().items():
            if ip in {address.address for address in addresses}:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class LeaveOnSigterm(WorkerCallback):
    """Ray runs a worker's training in a thread, in which no handler can be set: this runs in the main thread."""

    def after_init_train_context(self) -> None:
        """Set the handler."""
        leave_on_sigterm()


class Overseer(WorkerGroupCallback, ControllerCallback):
    """In the controller: says where the workers are, finds out why one died, and lets them leave in order."""

    def __init__(self) -> None:
        self._group: Any = None
        self._killed_for_memory: list[int] = []
        self._peer_lost_since: float | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Say where they are."""
        self._group, self._peer_lost_since = worker_group, None
        self._killed_for_memory = worker_group.execute(num_killed_for_memory)
        ips = [worker.metadata.node_ip for worker in worker_group.get_workers()]
        where = ", ".join(f"{ips.count(ip)} on {ip}" for ip in dict.fromkeys(ips))
        print(f"{PROGRESS_MARK} workers: {where}", flush=True)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """There are none now."""
        del worker_group_context
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Keep errors back that only tell of another worker's end, until that one's own is known or time is up."""
        errors = {rank: unwrapped(error) for rank, error in worker_group_status.errors.items()}
        statuses = worker_group_status.worker_statuses
        if all(is_peer_lost(error) for error in errors.values()):
            self._peer_lost_since = (self._peer_lost_since or time.monotonic()) if errors else None
            if self._peer_lost_since and time.monotonic() - self._peer_lost_since < PEER_PATIENCE_S:
                for rank in errors:
                    statuses[rank].error, statuses[rank].running = None, True
        for rank, error in errors.items():
            if isinstance(error, ActorDiedError) and not is_node_lost(error) and self._was_killed_for_memory(rank):
                where = self._group.get_workers()[rank].metadata.node_ip
                statuses[rank].error = OutOfMemoryError(f"killed by the kernel of {where}, which had no memory left")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Have the driver told why workers did not start: on its way there an error loses what it came from."""
        del previous_state
        failed = getattr(getattr(current_state, "next_state", None), "training_failed_error", None)
        if isinstance(failed, ControllerError) and failed.controller_failure.__cause__ is not None:
            failed.controller_failure = failed.controller_failure.__cause__

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers keep a checkpoint and end before they become more or fewer."""
        if self._group is None:
            return
        print(f"{PROGRESS_MARK} going on with {resize_decision.num_workers} workers", flush=True)
        deadline = time.monotonic() + LEAVE_PATIENCE_S
        # Without all of them alive there is nothing to wait for.
        with suppress(RayError):
            self._group.execute(signal.raise_signal, signal.SIGTERM)
            while not self._group.poll_status(timeout=1.0).finished and time.monotonic() < deadline:
                time.sleep(0.1)

    def _was_killed_for_memory(self, rank: int) -> bool:
        node_id = self._group.get_workers()[rank].metadata.node_id
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        probe = ray.remote(num_killed_for_memory).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        try:
            return bool(ray.get(probe.remote(), timeout=PROBE_S) > self._killed_for_memory[rank])
        except RayError:
            return False


@contextmanager
def causes_told() -> Iterator[None]:
    """Print what goes wrong inside in a line that whoever follows the job takes for the cause, with what was noted."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        is_training = isinstance(error, TrainingFailedError)
        cause = classify(error).cause if is_training else f"{type(error).__name__}: {lines[-1]}"
        notes = getattr(error, "__notes__", ())
        print(f"{PROGRESS_MARK} {ERROR_MARK} {'; '.join([cause, *notes])}", flush=True)
        raise

"""The Ray Train job around the loop: placement, and what is watched while the workers are at it.

Neither the driver of a run nor Ray's controller of its workers, which both import this, need torch: its import is most
of a process's start.
"""

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
from ray.train import BackendConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.records import Attempt
from training.requests import leave_on_sigterm
from training.retry import classify, is_node_lost, is_peer_lost, unwrapped
from training.say import ERROR_MARK, say_line
from training.spec import ComputeSpec
from training.system import num_killed_for_memory

# Workers notice at once that another one is gone; that its node is, the cluster says after missed health checks.
PEER_PATIENCE_S = 30.0
# For a last checkpoint, before the workers become more or fewer.
LEAVE_PATIENCE_S = 120.0
PROBE_S = 30.0


def build_trainer(attempt: Attempt, run_url: str, ray_folder: Path, *, accumulation: int) -> Trainer:
    """A trainer of one attempt, which goes on from the newest checkpoint in the run's records."""
    return on_workers(
        _train,
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
) -> Trainer:
    """A Ray Train run of `worker(config)` on every worker; Ray keeps what it wants to remember in `folder`, here.

    Whatever ends the workers is raised by its `fit`: see `training.retry`.
    """
    on_gpu = compute.gpus_per_worker > 0
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    return Trainer(
        worker,
        train_loop_config=config,
        backend_config=ProcessGroup(),
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


def _train(config: dict[str, Any]) -> None:
    from training.worker import train_worker

    train_worker(config)


class Trainer(DataParallelTrainer):
    """Ray's `TorchTrainer` without what a run does without, each a process of its own that imports for seconds."""

    def _create_default_callbacks(self) -> list[Any]:
        # There are no Ray datasets to share out, and with the driver the cluster frees the place of its workers.
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, without)]


class ProcessGroup(BackendConfig):
    """Of workers that join it by `Workers.join`, as those of torchrun do."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What prepares them for it."""
        return _Environment


class _Environment(Backend):
    """Sets the variables in which torchrun tells its workers where they are, and where the first of them listens."""

    # As Ray has it for torch: NCCL connects the GPUs of a node directly where each worker sees all of them.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        del backend_config
        worker_group.execute(_set_variables, *worker_group.execute_single(0, get_address_and_port))


def _set_variables(address: str, port: int) -> None:
    here = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(here.get_world_rank()),
        "WORLD_SIZE": str(here.get_world_size()),
        "GROUP_RANK": str(here.get_node_rank()),
        "LOCAL_RANK": str(here.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(here.get_local_world_size()),
    }


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

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Say what is waited for: a cluster may be full, or have to grow."""
        num_workers, resources = worker_group_context.num_workers, worker_group_context.resources_per_worker
        wanted = ", ".join(f"{number:g} {kind}" for kind, number in resources.items())
        say_line(f"asking for room for {num_workers} x ({wanted}), {worker_group_context.placement_strategy}")

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Say where they are."""
        self._group, self._peer_lost_since = worker_group, None
        self._killed_for_memory = worker_group.execute(num_killed_for_memory)
        ips = [worker.metadata.node_ip for worker in worker_group.get_workers()]
        where = ", ".join(f"{ips.count(ip)} on {ip}" for ip in dict.fromkeys(ips))
        say_line(f"workers: {where}")

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
        say_line(f"going on with {resize_decision.num_workers} workers")
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
        say_line(f"{ERROR_MARK} {'; '.join([cause, *notes])}")
        raise

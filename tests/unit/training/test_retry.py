"""What ended a group of workers, told from the errors that Ray Train raises, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ray import cloudpickle
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from data.decode import TooManyUnreadable, UndecodableImage
from data.objects import CorruptObject, MissingObject, SourceUnavailable, UnsupportedSource
from data.store import DiskFull
from training.errors import Diverged, MiscountedImages, Preempted
from training.retry import (
    LONG_S,
    MAX_HALVINGS,
    MAX_PAUSE_S,
    MAX_PREEMPTIONS,
    Failure,
    GiveUp,
    Kind,
    Retry,
    classify,
    decide,
)
from training.spec import ComputeSpec, RunSpec
from training.state import BadFreeze, UnfitWeights
from training.store import StorageFull, StorageUnavailable

MakeSpec = Callable[..., RunSpec]
# As Ray 2.60 says it.
PROCESS_DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed."
)
NODE_DIED = (
    "The actor died because its node has died. Node Id: 6572fb67bc0b\n\tthe actor's node was terminated unexpectedly: "
    "health check failed due to missing too many heartbeats"
)
MONITOR_KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: "
    "Task was killed due to the node running low on memory."
)
PEER_CLOSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.3.86.4]:35183"
)


def died(message: str, *, reason: int = NodeDeathInfo.UNSPECIFIED) -> WorkerHealthCheckFailedError:
    """A worker's end as the controller sees it."""
    context = ActorDiedErrorContext(
        actor_id=b"a" * 16, class_name="RayTrainWorker", pid=811, node_ip_address="10.3.86.4", error_message=message,
        node_death_info=NodeDeathInfo(reason=reason),
    )  # fmt: skip
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError(cause=context))


def task_error(cause: Exception) -> RayTaskError:
    """An error as `ray.get` raises it."""
    return RayTaskError("execute", "Traceback ...", cause, pid=1, ip="10.3.86.4").as_instanceof_cause()


def workers_failed(*errors: BaseException) -> WorkerGroupError:
    return WorkerGroupError("[Rank 0 Error Snippet]: ...", dict(enumerate(errors)))  # type: ignore[arg-type]


def travelled(error: Any) -> Any:
    """An error after Ray sent it to another process."""
    return cloudpickle.loads(cloudpickle.dumps(error))


def preempting() -> PreemptionError:
    return PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]}))


ALONE: list[tuple[BaseException, Kind]] = [
    (Diverged("the loss was not finite"), "deterministic"),
    (TooManyUnreadable("20 of 24 images"), "deterministic"),
    (UndecodableImage("a.jpg: no image"), "deterministic"),
    (UnfitWeights("no tensor fits"), "deterministic"),
    (BadFreeze("no part of that name"), "deterministic"),
    (MissingObject("s3://data/x.dir: not in this source"), "deterministic"),
    (CorruptObject("other bytes"), "deterministic"),
    (UnsupportedSource("gs://"), "deterministic"),
    (DiskFull("no room"), "deterministic"),
    (StorageFull("no room"), "deterministic"),
    (MiscountedImages("8 images, 7 detected on"), "deterministic"),
    (FileNotFoundError("warm_start"), "deterministic"),
    (TypeError("unexpected keyword argument"), "deterministic"),
    (SourceUnavailable("s3://data: connection refused"), "failure"),
    (StorageUnavailable("/mnt/runs: stale file handle"), "failure"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
    (MemoryError(), "out_of_memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out_of_memory"),
    (OutOfMemoryError("Task was killed due to the node running low on memory."), "out_of_memory"),
    (died(MONITOR_KILLED), "out_of_memory"),
    (died(NODE_DIED), "preempted"),
    (died("any words", reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED), "preempted"),
    (NodeDiedError("the node is unreachable"), "preempted"),
    (Preempted("a worker has to leave at step 7"), "preempted"),
    (died(PROCESS_DIED), "failure"),
    (WorkerHealthCheckTimeoutError("hanging for 600 s"), "failure"),
    (WorkerHealthCheckFailedError("A worker health check failed.", ActorUnavailableError("gone", None)), "preempted"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "failure"),
    (PEER_CLOSED, "failure"),
]


@pytest.mark.parametrize("wrap", [
    lambda error: error,
    lambda error: UserExceptionWithTraceback(error, "Traceback ..."),
    lambda error: WorkerHealthCheckFailedError("A worker health check failed.", task_error(error)),
], ids=["bare", "from the training thread", "from a task"])  # fmt: skip
@pytest.mark.parametrize(("error", "kind"), ALONE, ids=lambda value: value if isinstance(value, str) else None)
def test_a_single_error_is_known_whatever_is_around_it(
    error: BaseException, kind: Kind, wrap: Callable[[BaseException], BaseException]
) -> None:
    raised = workers_failed(wrap(error))
    for one in (raised, travelled(raised)):
        assert classify(one).kind == kind
        assert classify(one).cause.startswith("worker 0: ")


CONTROLLER: list[tuple[Exception, Kind]] = [
    (WorkerGroupStartupTimeoutError(2), "preempted"),
    (WorkerGroupStartupFailedError(f"One of the worker actors failed to initialize: {NODE_DIED}"), "preempted"),
    (WorkerGroupStartupFailedError(f"One of the worker actors failed to initialize: {PROCESS_DIED}"), "failure"),
    (InsufficientClusterResourcesError("the cluster only has a maximum of 8 GPUs"), "deterministic"),
    (RuntimeEnvSetupError("No space left"), "failure"),
    (task_error(torch.distributed.DistNetworkError("the client socket has timed out")), "failure"),
    (ValueError("in a callback"), "deterministic"),
]


@pytest.mark.parametrize(("error", "kind"), CONTROLLER, ids=lambda value: value if isinstance(value, str) else None)
def test_errors_of_the_controller_are_known(error: Exception, kind: Kind) -> None:
    raised = ControllerError(error)
    assert classify(raised).kind == classify(travelled(raised)).kind == kind


def test_an_announced_preemption_is_one() -> None:
    assert classify(preempting()).kind == classify(travelled(preempting())).kind == "preempted"


@pytest.mark.parametrize("lost", [
    PEER_CLOSED,
    torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
    RuntimeError("NCCL Error 6: remote process exited or there was a network error"),
    ConnectionResetError(104, "Connection reset by peer"),
    WorkerHealthCheckFailedError("A worker health check failed.", ActorUnavailableError("rpc failed", b"a" * 16)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("cause", "kind"), [
    (Diverged("not finite"), "deterministic"), (died(NODE_DIED), "preempted"), (died(PROCESS_DIED), "failure"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
], ids=["diverged", "node", "process", "memory"])  # fmt: skip
def test_whoever_lost_the_connection_to_another_worker_does_not_hide_its_end(
    lost: BaseException, cause: BaseException, kind: Kind
) -> None:
    for errors in ((lost, cause), (cause, lost), (lost, lost, cause)):
        failure = classify(workers_failed(*errors))
        assert failure.kind == kind
        assert failure.cause.startswith(f"worker {errors.index(cause)}: ")


def test_what_comes_again_outweighs_what_may_pass() -> None:
    assert classify(workers_failed(died(NODE_DIED), MissingObject("x"), died(PROCESS_DIED))).kind == "deterministic"


def test_a_cause_is_one_line_and_says_what_and_where() -> None:
    failure = classify(workers_failed(died(NODE_DIED)), 12.5)
    assert failure.lived_s == 12.5
    assert failure.cause == (
        "worker 0: The actor died because its node has died. Node Id: 6572fb67bc0b the actor's node was terminated "
        "unexpectedly: health check failed due to missing too many heartbeats (on 10.3.86.4)"
    )
    told = classify(workers_failed(ValueError("two\nlines, and more " + "x" * 1000))).cause
    assert told.startswith("worker 0: ValueError: two lines, and more xxx")
    assert len(told) < 500
    assert classify(workers_failed(MemoryError())).cause == "worker 0: MemoryError: MemoryError()"
    assert classify(TrainingFailedError("without workers")).cause == "TrainingFailedError: without workers"


@pytest.fixture
def spec(tiny_spec: MakeSpec) -> RunSpec:
    return tiny_spec(batch_size=16, compute=ComputeSpec(workers=2, max_failures=3))


def outcomes(spec: RunSpec, *kinds: Kind, lived_s: float = 0.0) -> list[Retry | GiveUp]:
    history = [Failure(kind, "something", lived_s) for kind in kinds]
    return [decide(history[:count], spec) for count in range(1, len(history) + 1)]


def test_failures_are_retried_as_often_as_the_spec_allows(spec: RunSpec) -> None:
    *retried, last = outcomes(spec, *["failure"] * 4)
    assert all(isinstance(one, Retry) and one.accumulation == 1 for one in retried)
    assert isinstance(last, GiveUp)
    assert "3 new starts after failures are allowed (compute.max_failures)" in last.told
    never = spec.model_copy(update={"compute": ComputeSpec(workers=2, max_failures=0)})
    assert isinstance(outcomes(never, "failure")[0], GiveUp)


def test_what_would_happen_again_is_not_tried_again(spec: RunSpec) -> None:
    assert isinstance(outcomes(spec, "deterministic")[0], GiveUp)
    assert isinstance(outcomes(spec, "preempted", "deterministic")[1], GiveUp)


def test_lost_machines_do_not_count_as_failures_and_are_bounded(spec: RunSpec) -> None:
    kinds: list[Kind] = ["preempted"] * MAX_PREEMPTIONS
    assert all(isinstance(one, Retry) for one in outcomes(spec, *kinds, "failure", "failure", "failure"))
    assert isinstance(outcomes(spec, *kinds, "preempted")[-1], GiveUp)
    assert isinstance(outcomes(spec, "failure", "preempted", "failure", "preempted", "failure", "failure")[-1], GiveUp)


def test_each_time_memory_runs_out_a_batch_is_cut_into_twice_as_many_parts(spec: RunSpec) -> None:
    halved = outcomes(spec, "out_of_memory", "preempted", "out_of_memory", "failure", "out_of_memory", "out_of_memory")
    *retried, last = halved
    assert [one.accumulation for one in retried if isinstance(one, Retry)] == [2, 2, 4, 4, 8]
    # Eight images on each of two workers: there is no fourth time.
    assert isinstance(last, GiveUp)
    assert "in 8 parts" in last.told
    assert "statistics change" in retried[0].told


@pytest.mark.parametrize(("batch_size", "accumulation", "expected"), [
    (2, 1, []), (3, 1, [2]), (16, 4, [8]), (16, 3, [6, 12]), (16, 8, []), (4096, 1, [2, 4, 8, 16]),
])  # fmt: skip
def test_a_batch_is_not_cut_below_an_image_nor_for_ever(
    tiny_spec: MakeSpec, batch_size: int, accumulation: int, expected: list[int]
) -> None:
    compute = ComputeSpec(workers=2, max_failures=0)
    spec = tiny_spec(batch_size=batch_size, accumulation=accumulation, compute=compute)
    *retried, last = outcomes(spec, *["out_of_memory"] * (len(expected) + 1))
    assert [one.accumulation for one in retried if isinstance(one, Retry)] == expected
    assert isinstance(last, GiveUp)
    assert len(expected) <= MAX_HALVINGS


def test_pauses_grow_while_workers_die_young(spec: RunSpec) -> None:
    pauses = [one.pause_s for one in outcomes(spec, *["preempted"] * 20) if isinstance(one, Retry)]
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_PAUSE_S
    calm = outcomes(spec, *["preempted"] * 20, lived_s=LONG_S)
    assert [one.pause_s for one in calm if isinstance(one, Retry)] == [1] * 20


def test_every_error_of_ours_can_travel() -> None:
    """An error that cannot be pickled reaches the driver as one of pickling."""
    ours = [error for error, _ in ALONE if type(error).__module__.partition(".")[0] in {"data", "training"}]
    assert len(ours) > 10
    for error in ours:
        again = travelled(error)
        assert type(again) is type(error)
        assert str(again) == str(error)

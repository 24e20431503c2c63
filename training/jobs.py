"""From outside the cluster: start one on this machine, and submit, follow, attach to and stop cells."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from training.joblog import POLL_S, JobLog
from training.records import Attempt
from training.spec import ComputeSpec, RunSpec

PACKAGES = ("models", "data", "evaluation", "training")
# Modules, and what they make pages of.
CODE_SUFFIXES = (".py", ".html", ".css")
# Read by glibc before a process starts. Large blocks stay with the process instead of being returned to the
# kernel and faulted in again at every step: +27% images/s at 640 px on a CPU.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"
)
AGENT_PATIENCE_S = 60.0
# A job that is stopped keeps a checkpoint first; then Ray kills it.
KILL_AFTER_S = 15
STOP_PATIENCE_S = 30.0
CONTACT_PATIENCE_S = 60.0
FINAL = {"SUCCEEDED", "FAILED", "STOPPED"}


class CellFailed(RuntimeError):
    """A cell's Ray job ended without success, after `job_s` seconds; 0 where none ran."""

    job_s = 0.0


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster: `address` for drivers, `jobs_url` of its job API.

    `resources` (CPU, GPU) of a cluster that cannot grow; empty for one that may.
    """

    address: str
    jobs_url: str
    resources: dict[str, float] = field(default_factory=dict)


def use_token(home: Path) -> None:
    """Turn Ray's token authentication on for this process and its children, unless the environment already did.

    The token is made on first use and readable by its owner alone. Must run before ray is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = home / "ray_token"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        # Linked into place whole: of two first starts one wins, and a kill leaves no empty token.
        with tempfile.NamedTemporaryFile("w", dir=home, prefix=".ray_token-") as stream, suppress(FileExistsError):
            stream.write(secrets.token_hex(32))
            stream.flush()
            os.link(stream.name, path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@contextmanager
def embedded_cluster(home: Path, *, num_cpus: int | None = None) -> Iterator[Cluster]:
    """A cluster on this machine that lives as long as this block, and dies with this process even on SIGKILL.

    Its dashboard and job API listen on loopback. Ray's own daemons listen on all addresses whatever they are told;
    they ask for the token.
    """
    use_token(home)
    # The controller asks its workers for news this often, and every report waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Nobody preempts one's own machine; watching for it costs a process at the start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(KILL_AFTER_S))
    # Ray would let workers yield to everything else: on a shared machine training then takes twice as long.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # When this process is killed, its jobs' drivers would wait a minute for the cluster to come back.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    import ray

    with _agent_at_any_port(), _without_secrets(), _signals_kept():
        context = ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=_free_port(),
            _node_ip_address="127.0.0.1",
            configure_logging=False,
            log_to_driver=False,
        )
    try:
        resources = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
        yield Cluster(context.address_info["gcs_address"], f"http://{context.dashboard_url}", resources)
    finally:
        ray.shutdown()


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Hide the flow's credentials while the cluster starts: its processes inherit the environment, and need none."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("MLFLOW_", "PREFECT_"))}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own on SIGTERM; the flow's, which ends its cells in order, must stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _agent_at_any_port() -> Iterator[None]:
    """`ray.init` has no argument for the job agent's port; at its fixed one a machine holds a single cluster."""
    from ray._private import parameter

    original = parameter.RayParams
    parameter.RayParams = partial(original, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = original


class Jobs:
    """The job API of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        from ray.job_submission import JobSubmissionClient

        self._jobs_url = cluster.jobs_url
        self._client = JobSubmissionClient(cluster.jobs_url)
        self._resources = cluster.resources
        # Ray itself would look for any cluster on the machine, and may find another one.
        self._address = {} if cluster.address == "auto" else {"RAY_ADDRESS": cluster.address}

    @property
    def embedded(self) -> bool:
        """True if the cluster is this process's own, which no other machine reaches."""
        return bool(self._resources)

    def living(self, run_key: str) -> str | None:
        """Submission id of a job of this run that has not ended, or None."""
        for job in self._client.list_jobs():
            name = job.submission_id or ""
            if name.rpartition("-")[0] == run_key and str(job.status.value) not in FINAL:
                return name
        return None

    def submit(self, attempt: Attempt, run: Path | str, code_folder: Path) -> str:
        """Submit an attempt to train; `run` is the folder or address of its records. See `start`."""
        arguments = ("training.job", str(run), str(attempt.number))
        return self.start(attempt.submission_id, arguments, attempt.spec, code_folder)

    def start(self, submission_id: str, module: Sequence[str], spec: RunSpec, code_folder: Path) -> str:
        """Submit `python -m <module and its arguments>`, whose workers are those of `spec`, with a copy of the code.

        `submission_id` is `<run key>-<number>`; what comes before the number says whose job it is.

        Raises:
            CellFailed: the cluster is too small for the job, or did not accept it.
        """
        for kind, wanted in demand(spec).items():
            there = self._resources.get(kind)
            if there is not None and wanted > there:
                raise CellFailed(
                    f"compute asks for {wanted:g} {kind} over {spec.compute.min_workers} workers, this machine has "
                    f"{there:g}; set compute.workers or compute.{kind.lower()}s_per_worker lower, and of "
                    "`speck evaluate` --workers"
                )
        environment = (
            self._address
            | {
                "GLIBC_TUNABLES": ALLOCATOR,
                "OMP_WAIT_POLICY": "PASSIVE",
                "RAY_DEDUP_LOGS": "0",
                # Or every printed line comes twice.
                "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_start_patience_s(spec.compute)),
            }
            | {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
        )
        command = ["env", *(f"{name}={value}" for name, value in self._address.items())]
        command += [sys.executable, "-m", *module]
        told = {"run_key": submission_id.rpartition("-")[0]}
        deadline = time.monotonic() + AGENT_PATIENCE_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(code_folder), "env_vars": environment},
                    metadata=told | {kind: str(wanted) for kind, wanted in demand(spec).items()},
                )
            except RuntimeError as error:
                # A node's job agent comes up seconds after the cluster answers.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise CellFailed(f"Ray refused job {submission_id}: {error}") from error
                time.sleep(0.5)
            else:
                return submission_id

    def stop(self, submission_id: str) -> None:
        """Stop a job and wait until it has ended; one that ended already is left alone.

        Raises:
            CellFailed: it still lives after STOP_PATIENCE_S.
        """
        deadline = time.monotonic() + STOP_PATIENCE_S
        self._client.stop_job(submission_id)
        while str(self._client.get_job_status(submission_id).value) not in FINAL:
            if time.monotonic() > deadline:
                raise CellFailed(
                    f"Ray job {submission_id} did not stop within {STOP_PATIENCE_S:.0f} s; look at it there"
                )
            time.sleep(POLL_S)

    def room(self, own: Collection[str]) -> dict[str, float]:
        """CPUs and GPUs of the cluster's living nodes that no other run's job asked for; jobs of `own` run keys
        do not count."""
        from ray.util.state import list_nodes

        room = {"CPU": 0.0, "GPU": 0.0}
        # Not by a filter of Ray's: it takes the dead nodes that it leaves out for an answer cut short, and raises.
        for node in list_nodes(address=self._jobs_url, limit=10_000):
            for kind in room if node.state == "ALIVE" else ():
                room[kind] += (node.resources_total or {}).get(kind, 0.0)
        for job in self._client.list_jobs():
            told = job.metadata or {}
            if str(job.status.value) not in FINAL and told.get("run_key") not in own:
                for kind in room:
                    room[kind] -= float(told.get(kind, 0.0))
        return room

    def follow(
        self, submission_id: str, on_line: Callable[[str], None], finished: Callable[[], bool] = lambda: False
    ) -> None:
        """Pass on the job's output line by line until it ends, or until `finished` says that all it was for is done.

        Ray notices the end of a job, and closes its log, seconds after the job wrote its result.

        When the connection breaks, it is made again and goes on where it was.

        Raises:
            CellFailed: it did not succeed; the message begins with what the workers named as the cause. Or the cluster
                could not be reached for CONTACT_PATIENCE_S.
        """
        from aiohttp import ClientError

        log = JobLog(self._client, submission_id, on_line)
        status = ""
        lost_contact: float | None = None
        while status not in FINAL and not finished():
            before = log.num_lines
            try:
                log.read(finished)
                status = str(self._client.get_job_status(submission_id).value)
            except (RuntimeError, OSError, ClientError) as error:
                if log.num_lines > before or lost_contact is None:
                    lost_contact = time.monotonic()
                if time.monotonic() - lost_contact > CONTACT_PATIENCE_S:
                    raise CellFailed(f"lost contact with Ray job {submission_id}: {error}") from error
                time.sleep(POLL_S)
        if finished() or status == "SUCCEEDED":
            return
        cause = "; ".join(log.causes) or (log.tail or ["it said nothing"])[-1]
        raise CellFailed(f"Ray job {submission_id} ended {status}: {cause}\n" + "\n".join(log.tail))


def _start_patience_s(compute: ComputeSpec) -> int:
    """How long workers wait for room: a cluster may be busy with other people's work, or have to grow first.

    Where fewer would do, only those are waited for that there was room for a moment ago.
    """
    return 86_400 if compute.min_workers == compute.max_workers else 60


def demand(spec: RunSpec) -> dict[str, float]:
    """CPUs and GPUs that a run's workers ask for, the fewest that it goes on with."""
    compute = spec.compute
    return {"CPU": compute.min_workers * compute.cpus_per_worker, "GPU": compute.min_workers * compute.gpus_per_worker}


@contextmanager
def code_snapshot(repo: Path) -> Iterator[Path]:
    """A temporary folder with the packages that workers need, as they are now, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="speck-code-") as folder:
        for package in PACKAGES:
            shutil.copytree(
                repo / package,
                Path(folder) / package,
                ignore=lambda where, names: (
                    [n for n in names if Path(where, n).is_file() and not n.endswith(CODE_SUFFIXES)]
                    + [n for n in names if n in {"__pycache__", "raw", "processed", "reports", "catalog"}]
                ),
            )
        yield Path(folder)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

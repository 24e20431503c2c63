"""From outside the cluster: submit, follow, attach to and stop cells."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training.cluster import Cluster
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
STOP_PATIENCE_S = 30.0
CONTACT_PATIENCE_S = 60.0
FINAL = {"SUCCEEDED", "FAILED", "STOPPED"}
SUPERVISOR_DIED = "JOB_SUPERVISOR_ACTOR_DIED"


class CellFailed(RuntimeError):
    """A cell's Ray job ended without success, after `job_s` seconds; 0 where none ran."""

    job_s = 0.0


class JobLost(CellFailed):
    """Not by its own fault: its driver was killed, or the cluster died or does not answer. Another may succeed."""


class Jobs:
    """The job API of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        from ray.job_submission import JobSubmissionClient

        self._jobs_url = cluster.jobs_url
        with self._contact():
            self._client = JobSubmissionClient(cluster.jobs_url)
        self._resources, self._may_grow_to = cluster.resources, cluster.may_grow_to
        # Ray itself would look for any cluster on the machine, and may find another one.
        self._address = {} if cluster.address == "auto" else {"RAY_ADDRESS": cluster.address}

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """Raises JobLost where Ray's API does not answer within this block, or answers that it cannot at present."""
        from requests import RequestException

        try:
            yield
        except (RequestException, ConnectionError) as error:
            raise JobLost(f"Ray's job API at {self._jobs_url} does not answer: {error}") from error
        except RuntimeError as error:
            if "status code 5" not in str(error):
                raise
            raise JobLost(f"Ray's job API at {self._jobs_url} fails: {error}") from error

    @property
    def embedded(self) -> bool:
        """True if the cluster is this process's own, which no other machine reaches."""
        return bool(self._resources)

    def page(self, submission_id: str) -> str:
        """Address of a job's page on the cluster's dashboard."""
        return f"{self._jobs_url.rstrip('/')}/#/jobs/{submission_id}"

    def living(self, run_key: str) -> str | None:
        """Submission id of a job of this run that has not ended, or None. Raises JobLost."""
        with self._contact():
            jobs = self._client.list_jobs()
        for job in jobs:
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
            JobLost: the cluster does not answer.
        """
        from requests import RequestException

        self.require_room(spec)
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
        job = {
            "entrypoint": shlex.join(command),
            "submission_id": submission_id,
            "runtime_env": {"working_dir": str(code_folder), "env_vars": environment},
            "metadata": told | {kind: str(wanted) for kind, wanted in demand(spec).items()},
        }
        while True:
            try:
                self._client.submit_job(**job)
            except (RequestException, ConnectionError) as error:
                raise JobLost(f"Ray's job API at {self._jobs_url} does not answer: {error}") from error
            except RuntimeError as error:
                # A node's job agent comes up seconds after the cluster answers.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise CellFailed(f"Ray refused job {submission_id}: {error}") from error
                time.sleep(0.5)
            else:
                return submission_id

    def require_room(self, spec: RunSpec) -> None:
        """Raises CellFailed where this machine alone can never hold the run's workers."""
        compute = spec.compute
        for kind, wanted in demand(spec).items():
            there = self._resources.get(kind)
            if there is not None and wanted > there:
                raise CellFailed(
                    f"this machine has {there:g} {kind}s, and {compute.min_workers} workers with "
                    f"compute.{kind.lower()}s_per_worker each ask for {wanted:g}: lower one of them, or --workers of "
                    "`speck evaluate`"
                )
        if self.embedded and compute.placement == "STRICT_SPREAD" and compute.min_workers > 1:
            raise CellFailed(
                f"compute.placement STRICT_SPREAD puts each of {compute.min_workers} workers on a node of its own, and "
                "this machine is one; use PACK, or a cluster (SPECK_RAY_JOBS_URL)"
            )

    def stop(self, submission_id: str) -> None:
        """Stop a job and wait until it has ended; one that ended already is left alone.

        Raises:
            CellFailed: it still lives after STOP_PATIENCE_S.
            JobLost: the cluster does not answer.
        """
        deadline = time.monotonic() + STOP_PATIENCE_S
        with self._contact():
            self._client.stop_job(submission_id)
            while str(self._client.get_job_status(submission_id).value) not in FINAL:
                if time.monotonic() > deadline:
                    raise CellFailed(
                        f"Ray job {submission_id} did not stop within {STOP_PATIENCE_S:.0f} s; look at it there"
                    )
                time.sleep(POLL_S)

    def room(self, own: Collection[str]) -> dict[str, float]:
        """CPUs and GPUs that no other run's job asked for, of the cluster's living nodes, or of as many as it may grow
        to; jobs of `own` run keys do not count. Raises JobLost.
        """
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        room = {"CPU": 0.0, "GPU": 0.0}
        try:
            with self._contact():
                # Not by a filter of Ray's: it takes the dead nodes that it leaves out for an answer cut short.
                nodes, jobs = list_nodes(address=self._jobs_url, limit=10_000), self._client.list_jobs()
        except RayStateApiException as error:
            raise JobLost(f"Ray at {self._jobs_url} does not tell of its nodes: {error}") from error
        for node in nodes:
            for kind in room if node.state == "ALIVE" else ():
                room[kind] += (node.resources_total or {}).get(kind, 0.0)
        # An autoscaler adds nodes only for what waits on the cluster.
        room = {kind: max(there, self._may_grow_to.get(kind, 0.0)) for kind, there in room.items()}
        for job in jobs:
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
            CellFailed: it did not succeed; the message begins with what the workers named as the cause.
            JobLost: nobody named one because its driver was killed, or the cluster could not be reached for
                CONTACT_PATIENCE_S.
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
                    raise JobLost(f"lost contact with Ray job {submission_id}: {error}") from error
                time.sleep(POLL_S)
        if finished() or status == "SUCCEEDED":
            return
        killed = None if log.causes or status != "FAILED" else self._killed(submission_id)
        cause = "; ".join(log.causes) or killed or (log.tail or ["it said nothing"])[-1]
        kind = CellFailed if killed is None else JobLost
        raise kind(f"Ray job {submission_id} ended {status}: {cause}\n" + "\n".join(log.tail))

    def _killed(self, submission_id: str) -> str | None:
        """How a job came to its end from outside, None where its driver ended by itself."""
        told = self._client.get_job_info(submission_id)
        if told.error_type == SUPERVISOR_DIED:
            return "the node of its driver died"
        # A shell in between tells the signal by an exit code above 128.
        code = told.driver_exit_code or 0
        return (
            f"its driver was killed by signal {-code if code < 0 else code - 128}" if code < 0 or code > 128 else None
        )


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

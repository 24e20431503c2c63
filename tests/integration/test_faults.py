"""What may happen to the workers of a real Ray job on one machine, and what it costs: no epoch is lost."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from chaos.cells import Cell, faulty_code
from chaos.processes import MARK, left_after, marked, new_mark, wait_until
from services.fault_proxy import FaultProxy, fault_proxy
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service

from training.checkpoint import CHECKPOINTS, newest_first, newest_valid, verify_checkpoint
from training.cluster import embedded_cluster
from training.jobs import Jobs
from training.records import RESULT, RunResult, attempt_name, hash_files, read_journal, read_result, record_attempt
from training.spec import ComputeSpec, RunSpec
from training.store import RunStore, open_store

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
MakeSpec = Callable[..., RunSpec]
SLOW = """
import time, training.loop
real = training.loop.to_device
def slowly(*arguments):
    time.sleep(0.7)
    return real(*arguments)
training.loop.to_device = slowly
"""
# Longer than Ray leaves the others when a worker is gone.
SLOW_STORAGE = """
import time, training.store
real = training.store.FolderStore.upload
def slowly(self, folder, name, **kept):
    if name.startswith("checkpoints/") and int(name.partition("/")[2][:9]) % 12:
        time.sleep(8)
    real(self, folder, name, **kept)
training.store.FolderStore.upload = slowly
"""
HANGING = """
import torch.distributed as dist, training.loop
real, count = training.loop.to_device, [0]
def waiting_for_nothing():
    threading.Event().wait()
def hanging(*arguments):
    count[0] += 1
    if dist.get_rank() == 1 and count[0] == 8 and not marker.exists():
        marker.touch()
        waiting_for_nothing()
    return real(*arguments)
training.loop.to_device = hanging
"""
GREEDY = """
import training.loop
Path({group!r}).write_text(str(os.getpid()))
real = training.loop.to_device
def greedy(*arguments):
    if config["accumulation"] == 1:
        held = bytearray(3 * 2**30)
        held[::4096] = b"x" * len(held[::4096])
    return real(*arguments)
training.loop.to_device = greedy
"""


@dataclass
class Service:
    """An embedded cluster; `start` submits the next attempt of a run, with a fault in its workers' code if given."""

    jobs: Jobs
    home: Path
    mark: str
    source: str
    s3: FaultProxy | None

    def start_on_s3(self, spec: RunSpec) -> tuple[Cell, RunStore]:
        """Submit a run whose records lie in a bucket."""
        store = open_store(f"s3://runs/prefix/{spec.run_key}")
        folder = self.home / "copies" / spec.run_key
        attempt = record_attempt(folder, spec, data_source=self.source, code_hash="c" * 12)
        store.write(attempt_name(attempt.number), (folder / attempt_name(attempt.number)).read_bytes())
        with faulty_code() as code:
            return Cell(self.jobs, self.jobs.submit(attempt, store.url, code), folder), store

    def start(self, spec: RunSpec, fault: str = "", *, runs: Path | None = None) -> Cell:
        folder = (runs or self.home / "runs") / spec.run_key
        attempt = record_attempt(folder, spec, data_source=self.source, code_hash="c" * 12)
        with faulty_code(fault and f"marker = Path({str(self.home / f'fault-{spec.run_key}')!r})\n{fault}") as code:
            return Cell(self.jobs, self.jobs.submit(attempt, folder, code), folder)

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        return marked(self.mark, "RayTrainWorker")


@pytest.fixture(scope="module")
def service(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home, mark = tmp_path_factory.mktemp("home"), new_mark()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, mark)
        environment.setenv("SPECK_STORE", str(home / "store"))
        with ExitStack() as stack:
            s3 = None
            if RCLONE is not None:
                (home / "s3" / "runs").mkdir(parents=True)
                server = stack.enter_context(s3_service(home / "s3"))
                s3 = stack.enter_context(fault_proxy(int(server.url.rpartition(":")[2])))
                for name, value in (server.environment | {"AWS_ENDPOINT_URL": s3.url}).items():
                    environment.setenv(name, value)
            cluster = stack.enter_context(embedded_cluster(home, num_cpus=2))
            yield Service(Jobs(cluster), home, mark, tiny.source, s3)
    assert left_after(mark, 30) == [], "processes that outlived the cluster"


def two_workers(**changes: Any) -> ComputeSpec:
    return ComputeSpec(**{"workers": 2, "max_failures": 0} | changes)


def assert_whole(cell: Cell, epochs: int, steps_per_epoch: int = 12) -> None:
    """The run is done, and every epoch is in the journal once."""
    output = cell.join()
    assert cell.failed is None, cell.failed
    assert read_result(cell.folder) is not None, output
    expected = [(epoch, epoch * steps_per_epoch) for epoch in range(1, epochs + 1)]
    assert [(entry.epoch, entry.step) for entry in read_journal(cell.folder)] == expected


def wait_for_progress(cell: Cell) -> None:
    wait_until(lambda: any("step " in line and "ETA" in line for line in cell.lines) or cell.failed, 120, "no step")


@pytest.mark.soak
def test_a_stopped_job_goes_on_within_its_epoch(service: Service, tiny_spec: MakeSpec) -> None:
    """Steps that take long, so that the stop comes within an epoch."""
    spec = tiny_spec(epochs=2, batch_size=2, seed=11, compute=two_workers())
    cell = service.start(spec, SLOW)
    wait_for_progress(cell)
    service.jobs.stop(cell.submission_id)
    assert "asked to stop" in cell.join()
    assert read_result(cell.folder) is None
    manifest = verify_checkpoint(next(newest_first(cell.folder)), spec.run_key)
    assert manifest.step % 12 != 0, "a checkpoint within an epoch"
    again = service.start(spec)
    assert_whole(again, 2)
    assert f"resuming from {manifest.step:09d}" in "\n".join(again.lines)
    first = min(int(line.partition("step ")[2].partition("/")[0]) for line in again.lines if "ETA" in line)
    assert first > manifest.step


def test_a_worker_that_has_to_leave_costs_no_step_and_is_no_failure(service: Service, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(epochs=3, batch_size=2, seed=12, compute=two_workers())
    cell = service.start(spec, SLOW_STORAGE)
    wait_until(lambda: list(newest_first(cell.folder)) or cell.failed, 120, "no checkpoint")
    service.workers()[-1].terminate()
    assert_whole(cell, 3)
    told = "\n".join(cell.lines)
    assert "starting again (1 of 50)" in told
    left_at = int(re.findall(r"has to leave at step (\d+)", told)[0])
    assert f"resuming from {left_at:09d}" in told


@pytest.mark.soak
def test_a_worker_that_hangs_says_where_and_is_started_again(service: Service, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(epochs=2, seed=13, compute=two_workers(max_failures=1, hang_timeout_s=15))
    cell = service.start(spec, HANGING)
    assert_whole(cell, 2, steps_per_epoch=6)
    told = "\n".join(cell.lines)
    assert "error: worker 1 made no progress for 15 s" in told
    assert "in waiting_for_nothing" in told
    assert "starting again after a failure (1 of 1)" in told


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group whose processes the kernel kills when they use more memory."""
    folder = MEMORY_GROUPS / f"speck-{uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        # Or the kernel would swap instead, where there is swap.
        with suppress(OSError):
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        pytest.skip(f"needs a memory control group (version 1) that may be written: {error}")
    try:
        yield folder
    finally:
        wait_until(lambda: not (folder / "cgroup.procs").read_text().split(), 60, "a process outlived its cell")
        folder.rmdir()


@pytest.mark.soak
def test_a_worker_killed_for_its_memory_gets_less_at_a_time(service: Service, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(epochs=2, batch_size=8, seed=14, compute=two_workers())
    with memory_group(2 * 2**30) as group:
        cell = service.start(spec, GREEDY.format(group=str(group / "cgroup.procs")))
        assert_whole(cell, 2, steps_per_epoch=3)
    told = "\n".join(cell.lines)
    assert "no memory left" in told
    assert "each worker's share of a batch in 2 parts: the same batch, but batch normalisation sees less" in told
    assert [entry.metrics["train/accumulation"] for entry in read_journal(cell.folder)] == [2, 2]


@pytest.mark.soak
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(
    service: Service, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        runs = disk / "runs"
        spec = tiny_spec(epochs=6, seed=15, batch_size=8, compute=two_workers())
        cell = service.start(spec, runs=runs)
        wait_until(lambda: list(newest_first(cell.folder)) or cell.failed, 120, "no checkpoint")
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        cell.join()
        assert cell.failed is not None
        assert "No space left on device" in str(cell.failed)
        assert "Free some space" in str(cell.failed)
        whole = [verify_checkpoint(folder, spec.run_key).step for folder in newest_first(cell.folder)]
        assert whole, f"nothing whole in {list((cell.folder / CHECKPOINTS).iterdir())}"
        assert read_result(cell.folder) is None
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = service.start(spec, runs=runs)
        assert_whole(again, 6, steps_per_epoch=3)
        assert f"resuming from {whole[0]:09d}" in "\n".join(again.lines)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_a_run_on_s3_survives_a_killed_worker_and_a_server_that_fails(
    service: Service, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    """A tenth of all requests fails, one way or another, and a worker is killed after the first checkpoint."""
    assert service.s3 is not None
    service.s3.failing_share = 0.1
    spec = tiny_spec(epochs=4, batch_size=2, seed=16, compute=two_workers(max_failures=1, keep_checkpoints=1))
    cell, store = service.start_on_s3(spec)
    wait_until(lambda: read_journal(store) or cell.failed, 120, "no epoch", every_s=0.5)
    service.workers()[0].kill()
    told = cell.join()
    service.s3.failing_share = 0.0
    assert cell.failed is None, cell.failed
    assert service.s3.num_faults > 3
    assert "resuming from" in told
    assert [(entry.epoch, entry.step) for entry in read_journal(store)] == [(1, 12), (2, 24), (3, 36), (4, 48)]
    result = RunResult.model_validate_json(store.read(RESULT))
    artifacts = store.download("artifacts", tmp_path / "artifacts")
    assert result.files == hash_files(tmp_path, artifacts)
    newest = newest_valid(store, tmp_path / "checkpoints", print)
    assert newest is not None
    assert verify_checkpoint(newest, spec.run_key).step == 48
    assert not (service.home / "runs" / spec.run_key).exists(), "nothing lies in a folder instead"

"""A flow run that is killed with its worker, on a Ray cluster that lives on: the next run takes over its job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from chaos.processes import marked, wait_until
from ray.job_submission import JobSubmissionClient
from services.deployment import RUN_S, Deployed, deployed_checkout
from services.ray_cluster import lasting_cluster

CHANGES = [
    "training.epochs=400", "training.closing_epochs=0", "training.input_size_px=64", "training.batch_size=2",
    "compute.workers=1", "settings.yolox-nano={width: 0.125}",
]  # fmt: skip
CELL = {"architectures": ["yolox-nano"], "datasets": ["sample-aerial"], "changes": CHANGES}
# The limit for a job to stop after its flow is cancelled.
STOPS_S = 30.0

pytestmark = pytest.mark.soak


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of flows that use a cluster which outlives them."""
    with lasting_cluster(tmp_path_factory.mktemp("cluster")) as environment:
        yield environment


def jobs(url: str) -> dict[str, str]:
    """States of submitted jobs by name; Ray lists every driver beside them, this process's, too."""
    listed = JobSubmissionClient(url).list_jobs()
    return {job.submission_id: str(job.status.value) for job in listed if job.submission_id}


def kill_worker_and_flow(deployed: Deployed) -> None:
    """As when a machine loses its power: nobody is left to tell Prefect."""
    victims = [*marked(deployed.mark, "worker start"), *marked(deployed.mark, "prefect.engine")]
    victims += [*marked(deployed.mark, "flow-run execute")]
    assert len({process.pid for process in victims}) >= 2, [process.cmdline() for process in marked(deployed.mark)]
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def is_driver(process: psutil.Process, run_folder: Path) -> bool:
    """Whether it is the Python process of a job's driver, not the shell around it."""
    with suppress(psutil.Error):
        line = process.cmdline()
        return "training.job" in line and str(run_folder) in line and "-m" in line and line[0] != "env"
    return False


def test_the_next_run_marks_the_dead_one_and_attaches_to_its_job(tmp_path: Path, cluster: dict[str, str]) -> None:
    url = cluster["SPECK_RAY_JOBS_URL"]
    with deployed_checkout(tmp_path, cluster) as deployed:

        def epochs() -> int:
            return len(list((deployed.home / "runs").glob("*/journal/*.json")))

        with deployed.worker():
            first = deployed.start(**CELL)
            wait_until(lambda: epochs() >= 2, RUN_S, "two epochs", every_s=0.5)
            (job,) = jobs(url)
            kill_worker_and_flow(deployed)
        assert deployed.state(first)["type"] == "RUNNING", "nobody could tell Prefect"
        assert jobs(url) == {job: "RUNNING"}
        with deployed.worker():
            started = time.monotonic()
            second = deployed.start(**CELL)
            attached = f"attaching to Ray job {job}"
            wait_until(lambda: any(attached in line for line in deployed.log(second)), RUN_S, attached, every_s=0.5)
            print(f"attached {time.monotonic() - started:.0f} s after the command")
            state = deployed.state(first)
            assert state["type"] == "CRASHED"
            assert "is gone; flow run" in state["message"]
            tasks = deployed.service.request("/task_runs/filter", {"flow_runs": {"id": {"any_": [first]}}})
            assert {task["state_type"] for task in tasks} <= {"COMPLETED", "CRASHED"}
            before = epochs()
            wait_until(lambda: epochs() > before, RUN_S, "another epoch", every_s=0.5)
            assert jobs(url) == {job: "RUNNING"}, "a second job for the same cell"

            cancelled = time.monotonic()
            deployed.cancel(second)
            wait_until(lambda: jobs(url) == {job: "STOPPED"}, STOPS_S, "the end of the job", every_s=0.2)
            print(f"stopped {time.monotonic() - cancelled:.0f} s after it was cancelled")
            assert deployed.end(second)["type"] == "CANCELLED"
        assert list((deployed.home / "leases").glob("*.json")) == []


def test_a_driver_that_is_killed_is_started_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    url = cluster["SPECK_RAY_JOBS_URL"]
    with deployed_checkout(tmp_path, cluster) as deployed, deployed.worker():
        run_id = deployed.start(**CELL)
        journal = deployed.home / "runs"
        wait_until(lambda: len(list(journal.glob("*/journal/*.json"))) >= 2, RUN_S, "two epochs", every_s=0.5)
        (first,) = jobs(url)
        (run_folder,) = (path for path in journal.iterdir() if path.is_dir())
        drivers = [process for process in psutil.process_iter() if is_driver(process, run_folder)]
        assert drivers
        for driver in drivers:
            driver.kill()
        wait_until(lambda: len(jobs(url)) == 2, RUN_S, "a second attempt", every_s=0.5)
        went_on = "resuming from"
        wait_until(lambda: any(went_on in line for line in deployed.log(run_id)), RUN_S, went_on, every_s=0.5)
        assert jobs(url)[first] == "FAILED"
        assert deployed.state(run_id)["type"] == "RUNNING"
        deployed.cancel(run_id)
        assert deployed.end(run_id)["type"] == "CANCELLED"

"""A cell on a stack whose training waits after its first epoch, so that a fault meets it at work."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil
from chaos.cells import HELD, SHIM
from chaos.processes import wait_until
from services.stack import Running

from infra.supervision import Supervisor
from tracking.client import connect
from training.records import RESULT, read_journal
from training.store import open_store

EPOCHS, STEPS_PER_EPOCH = 5, 8
CHANGES = [
    f"training.epochs={EPOCHS}", "training.closing_epochs=0", "training.input_size_px=64", "training.batch_size=2",
    "settings.yolox-nano={width: 0.125}",
]  # fmt: skip
WAIT_S = 300.0


@dataclass(frozen=True)
class HeldRun:
    """A cell that was trained for an epoch and waits; `run_id` is the flow run's."""

    running: Running
    seed: int
    run_id: str
    run_key: str

    def release(self) -> None:
        """Let it train on."""
        _hold(self.running).unlink()

    def again(self) -> str:
        """Another flow run of the same cell; returns its id."""
        return _start(self.running, self.seed)

    def jobs(self) -> dict[str, str]:
        """Submission ids and states of its Ray jobs."""
        jobs = self.running.ray("api/jobs/")
        found = {str(job["submission_id"]): str(job["status"]) for job in jobs if job["submission_id"]}
        return {name: state for name, state in found.items() if name.startswith(self.run_key)}

    def assert_whole(self) -> None:
        """It has a result, and every epoch is in its journal and in MLflow once."""
        epochs = list(range(1, EPOCHS + 1))
        with patch.dict(os.environ, self.running.stack.client_environment()):
            store = open_store(f"{os.environ['SPECK_STORAGE']}/{self.run_key}")
            assert store.read(RESULT)
            assert [entry.epoch for entry in read_journal(store)] == epochs
            client = connect(self.running.stack.url("mlflow"))
            experiment = client.get_experiment_by_name("sample-aerial").experiment_id
            (run,) = client.search_runs([experiment], f"tags.`speck.run_key` = '{self.run_key}'")
            assert run.info.status == "FINISHED"
            steps = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss"))
            assert steps == {STEPS_PER_EPOCH * epoch: 1 for epoch in epochs}


def make_holdable(running: Running) -> None:
    """Change the stack's copy of the checkout, so that its cells can be held."""
    worker = running.repo / "training" / "worker.py"
    held = HELD.format(hold=str(_hold(running)), steps=STEPS_PER_EPOCH)
    worker.write_text(worker.read_text() + SHIM.format(body=textwrap.indent(held, "    ")))


def hold_run(running: Running, seed: int, *changes: str) -> HeldRun:
    """Start a cell from a shell, and return when it waits. No other run may be under way. `changes` as of `--set`."""
    before = _run_keys(running)
    _hold(running).touch()
    run_id = _start(running, seed, *changes)
    wait_until(lambda: _run_keys(running) - before, WAIT_S, "a report", every_s=0.5)
    (run_key,) = _run_keys(running) - before
    return HeldRun(running, seed, run_id, run_key)


def kill_service(running: Running, name: str) -> None:
    """SIGKILL to all of a service's processes; the supervisor starts it again."""
    guard = psutil.Process(Supervisor(running.stack).processes()[name].pid)
    for process in [*guard.children(recursive=True), guard]:
        # One may end by itself when its parent does.
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _start(running: Running, seed: int, *changes: str) -> str:
    return running.start(
        changes=[*CHANGES, *changes], architectures=["yolox-nano"], datasets=["sample-aerial"], seeds=[seed]
    )


def _hold(running: Running) -> Path:
    return running.folder / "hold"


def _run_keys(running: Running) -> set[str]:
    """Of runs that have reported an epoch."""
    return {key.split("/")[1] for key in running.objects("runs/") if "/journal/" in key}

"""The same run without Ray: what `speck plan --specs` writes, trained by two processes under torchrun."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chaos.processes import MARK, left_after, new_mark, wait_until
from conftest import SETTINGS, SIDE_PX
from safetensors.torch import load_file
from typer.testing import CliRunner

from data.versioning import DatasetVersion
from flows.cli import app
from training.checkpoint import newest_first, verify_checkpoint
from training.ledger import read_ledger, read_usages
from training.records import read_journal, read_result
from training.spec import RunSpec

ROOT = Path(__file__).parents[2]
NUM_EPOCHS, STEPS_PER_EPOCH = 4, 12
EXPERIMENT = {
    "architectures": ["yolox-nano"],
    "datasets": ["tiny-squares"],
    "settings": {"yolox-nano": SETTINGS},
    "training": {
        "epochs": NUM_EPOCHS, "batch_size": 2, "input_size_px": SIDE_PX, "warmup_epochs": 0.5, "closing_epochs": 1,
        "precision": "fp32", "ema_ramp_steps": 10.0,
    },
    "compute": {"workers": 2, "price_per_hour": 36.0},
}  # fmt: skip


@dataclass(frozen=True)
class Torchrun:
    """Starts two processes for one spec; its runs lie in `runs`."""

    spec_file: Path
    source: str
    runs: Path

    @property
    def run_folder(self) -> Path:
        """Of the only run."""
        return self.runs / self.spec_file.stem

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """A living torchrun, of which nothing is left in the end."""
        mark = new_mark()
        environment = os.environ | {MARK: mark, "SPECK_STORE": str(self.runs.parent / "store"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "training.loop", str(self.spec_file), "--runs", str(self.runs), "--data", self.source]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                yield process
            finally:
                process.kill()
        assert left_after(mark, 30) == [], "processes that outlived torchrun"

    def to_its_end(self) -> str:
        """Run it and return what it printed."""
        with self.started() as process:
            output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def spec_file(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only cell of a plan, as the command line writes it."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    version = DatasetVersion(tiny.card.name, tiny.version, 0, 0, {}, regenerated=False)
    with pytest.MonkeyPatch.context() as patch:
        # The dataset is of the tests, not of the repository.
        patch.setattr("flows.experiment.load_card", lambda _: tiny.card)
        patch.setattr("data.versioning.planned_version", lambda *_: version)
        patch.setenv("SPECK_HOME", str(folder / "home"))
        answer = CliRunner().invoke(
            app, ["plan", "--spec", str(folder / "experiment.yaml"), "--specs", str(folder / "specs")]
        )
    assert answer.exit_code == 0, answer.output
    (path,) = (folder / "specs").iterdir()
    assert path.stem == RunSpec.model_validate_json(path.read_bytes()).run_key
    return path


@pytest.fixture(scope="module")
def undisturbed(spec_file: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Torchrun:
    """A run that nobody interrupted."""
    torchrun = Torchrun(spec_file, tiny.source, tmp_path_factory.mktemp("undisturbed") / "runs")
    torchrun.to_its_end()
    return torchrun


def require_whole(run_folder: Path, spec_file: Path, *, attempts: int) -> dict[str, float]:
    """Check that a run has ended with each epoch once; returns the losses by epoch and name."""
    result = read_result(run_folder)
    assert result is not None
    assert (result.spec, result.attempts) == (RunSpec.model_validate_json(spec_file.read_bytes()), attempts)
    assert len(list((run_folder / "journal").iterdir())) == NUM_EPOCHS
    journal = read_journal(run_folder)
    assert [(entry.epoch, entry.step) for entry in journal] == [
        (epoch, STEPS_PER_EPOCH * epoch) for epoch in range(1, NUM_EPOCHS + 1)
    ]
    # Two workers with one CPU each, whichever attempt did what.
    ledger = read_ledger(run_folder)
    assert ledger is not None
    useful_s = 2 * (sum(entry.seconds for entry in journal) + result.seconds["score_test"])
    assert ledger.total.useful_s == pytest.approx(useful_s)
    assert list(ledger.attempts) == list(range(1, attempts + 1))
    assert all(account.useful_s < account.held_s for account in ledger.attempts.values())
    assert ledger.total.price == pytest.approx(36 * ledger.total.held_s / 3600)
    return {
        f"{entry.epoch} {name}": value
        for entry in journal
        for name, value in entry.metrics.items()
        if name.startswith(("train/loss", "val/"))
    }


def test_a_run_tells_of_its_packages_its_machine_and_its_load(undisturbed: Torchrun) -> None:
    (usage,) = read_usages(undisturbed.run_folder)
    (node,) = usage.nodes
    assert (node.number, node.host, node.num_cpus) == (0, platform.node(), os.cpu_count())
    packages = (undisturbed.run_folder / "attempts" / "001" / "environment.txt").read_text().splitlines()
    assert f"torch=={torch.__version__}" in packages
    for entry in read_journal(undisturbed.run_folder):
        assert {name for name in entry.metrics if name.startswith("system/") and "gpu" not in name} == {
            "system/cpu_percent", "system/memory_used_gib", "system/process_memory_gib",
        }  # fmt: skip


def test_a_run_is_done_once(undisturbed: Torchrun) -> None:
    assert require_whole(undisturbed.run_folder, undisturbed.spec_file, attempts=1)
    assert undisturbed.to_its_end().count("is there: the run is done") == 1
    require_whole(undisturbed.run_folder, undisturbed.spec_file, attempts=1)


@pytest.mark.soak
def test_a_run_that_was_told_to_leave_within_an_epoch_ends_as_if_it_had_not(
    undisturbed: Torchrun, tmp_path: Path
) -> None:
    """Bit for bit: in whichever order gloo adds up the gradients of two workers, the sum is the same."""
    torchrun = Torchrun(undisturbed.spec_file, undisturbed.source, tmp_path / "runs")
    with torchrun.started() as process:
        wait_until(lambda: list(torchrun.run_folder.glob("journal/*.json")), 120, "an epoch")
        process.terminate()
        output, _ = process.communicate(timeout=300)
    assert "a worker has to leave at step" in output
    assert read_result(torchrun.run_folder) is None
    furthest = next(newest_first(torchrun.run_folder))
    step = verify_checkpoint(furthest, torchrun.spec_file.stem).step
    state = json.loads((furthest / "state.json").read_bytes())
    assert step == STEPS_PER_EPOCH * state["epoch"] + state["steps_in_epoch"]
    assert state["steps_in_epoch"] > 0
    output = torchrun.to_its_end()
    assert f"resuming from {furthest.name}" in output
    assert require_whole(torchrun.run_folder, torchrun.spec_file, attempts=2) == require_whole(
        undisturbed.run_folder, undisturbed.spec_file, attempts=1
    )
    weights, expected = (
        load_file(one.run_folder / "artifacts" / "weights.safetensors") for one in (torchrun, undisturbed)
    )
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []

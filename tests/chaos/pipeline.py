"""The whole pipeline as a user starts it, in a copy of the repository with a dataset of seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from chaos.processes import MARK, PATIENCE, marked, new_mark, wait_until
from services.checkout import commit_all

from training.records import RESULT, JournalEntry, read_journal

ROOT = Path(__file__).parents[2]
NUM_EPOCHS = 6
EXPERIMENT: dict[str, Any] = {
    "architectures": ["yolox-nano"],
    "datasets": ["sample-aerial"],
    "settings": {"yolox-nano": {"width": 0.125}},
    "training": {"epochs": NUM_EPOCHS, "batch_size": 2, "input_size_px": 64, "warmup_epochs": 0.5, "closing_epochs": 1},
    "compute": {"workers": 2},
}
RECIPE = {"image_size_px": 128, "num_images": {"train": 12, "val": 4, "test": 4}}


@dataclass
class FlowRun:
    """One `speck train`; `lines` grows while it runs. `mark` finds its descendants."""

    process: subprocess.Popen[str]
    mark: str
    lines: list[str] = field(default_factory=list)
    reading: bool = True

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
        self.reading = False

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return "\n".join(self.lines)

    def kill(self, *, with_descendants: bool = False) -> None:
        """SIGKILL to the flow's own process, as an out-of-memory killer would, or to all, as a power cut would."""
        self.process.kill()
        for descendant in marked(self.mark) if with_descendants else []:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
        self.process.wait()

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE * timeout_s)


@dataclass(frozen=True)
class Pipeline:
    """A repository in `repo`, and what its runs leave in `home`."""

    repo: Path
    home: Path

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, experiment: str = "experiment.yaml"
    ) -> FlowRun:
        """`speck COMMAND`, by default `train yolox-nano sample-aerial`, in a session of its own."""
        mark = new_mark()
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        variables = inherited | {
            "HOME": str(self.home.parent),
            "PYTHONPATH": str(self.repo),
            "PYTHONUNBUFFERED": "1",
            "SPECK_HOME": str(self.home),
            "SPECK_STORE": str(self.home / "store"),
            MARK: mark,
            **(environment or {}),
        }
        arguments = command or ("train", "yolox-nano", "sample-aerial")
        process = subprocess.Popen(
            # A test run in the background ignores Ctrl-C, and what it starts would inherit that.
            ["env", "--default-signal=INT", sys.executable, "-m", "flows", *arguments,
             "--spec", str(self.repo / experiment)],
            cwd=self.repo, env=variables, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return FlowRun(process, mark)

    @property
    def run_folder(self) -> Path:
        """The only run's folder."""
        (folder,) = (path for path in (self.home / "runs").iterdir() if path.is_dir())
        return folder

    def journal(self) -> list[JournalEntry]:
        """What the only run has reported, nothing if it has not begun."""
        folders = list((self.home / "runs").glob("*/journal"))
        return read_journal(folders[0].parent) if folders else []

    def kill_after_report(
        self, run: FlowRun, *, of_last_epoch: bool, with_descendants: bool, timeout_s: float = 120
    ) -> None:
        """Kill `run` as soon as it has reported an epoch itself, the last one if so asked.

        Raises:
            RuntimeError: it ended before, or has a result.
        """
        known = {(entry.attempt, entry.epoch) for entry in self.reports()}

        def is_due() -> bool:
            if run.process.poll() is not None:
                raise RuntimeError(f"ended with {run.process.returncode} before its report:\n{run.output}")
            new = [entry for entry in self.reports() if (entry.attempt, entry.epoch) not in known]
            return any(entry.epoch == NUM_EPOCHS or not of_last_epoch for entry in new)

        try:
            wait_until(is_due, timeout_s, "a report")
        finally:
            run.kill(with_descendants=with_descendants)
        if (self.run_folder / RESULT).exists():
            raise RuntimeError(f"killed too late, the run has its result:\n{run.output}")

    def reports(self) -> list[JournalEntry]:
        """Every journal object, also of epochs that were done before."""
        paths = (self.home / "runs").glob("*/journal/*.json")
        return [JournalEntry.model_validate_json(path.read_bytes()) for path in sorted(paths)]


def make_pipeline(folder: Path) -> Pipeline:
    """A copy of the repository's tracked and new files, without tests, and with a recipe for a few small pictures."""
    repo = folder / "repo"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")) and name != "dvc.lock":
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, repo / name)
    recipe = repo / "data" / "raw" / "sample-aerial" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | RECIPE))
    (repo / "params.yaml").write_text("datasets:\n  - sample-aerial\n")
    (repo / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    commit_all(repo)
    return Pipeline(repo, folder / "home")

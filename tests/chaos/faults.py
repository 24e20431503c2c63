"""Faults that a test switches on and off, in the copy of the repository that a `Pipeline` owns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from chaos.pipeline import Pipeline

Fault = Literal["raise", "diverge", "kill"]
# Where a cell has a fault, its workers find a file of the cell's name.
SHIM = """

_train_worker = train_worker


def train_worker(config):
    import os
    from pathlib import Path
    import signal

    import training.loop

    spec = Attempt.model_validate(config["attempt"]).spec
    fault = Path({folder!r}, f"{{spec.architecture.name}} {{spec.dataset.name}} {{spec.seed}}")
    kind = fault.read_text() if fault.exists() else ""
    if kind == "raise":
        raise ValueError("poisoned by the test")
    if kind == "diverge":
        to_device = training.loop.to_device

        def blinded(batch, device):
            images, targets = to_device(batch, device)
            return images * float("nan"), targets

        training.loop.to_device = blinded
    if kind == "kill":
        def killed(self, state, every_s=5.0):
            os.kill(os.getpid(), signal.SIGKILL)

        training.loop.Meter.news = killed
    _train_worker(config)
"""


class Faults:
    """The faults of a pipeline's cells."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.folder = pipeline.home.parent / "faults"
        self.folder.mkdir()
        worker = pipeline.repo / "training" / "worker.py"
        worker.write_text(worker.read_text() + SHIM.format(folder=str(self.folder)))

    def inject(self, architecture: str, dataset: str, seed: int, fault: Fault) -> None:
        """From now on, every attempt of this cell ends by this fault."""
        self._file(architecture, dataset, seed).write_text(fault)

    def clear(self) -> None:
        """From now on, no cell has a fault."""
        for file in self.folder.iterdir():
            file.unlink()

    def _file(self, architecture: str, dataset: str, seed: int) -> Path:
        return self.folder / f"{architecture} {dataset} {seed}"

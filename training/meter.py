"""Running means of one epoch, and the pace of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from training.spec import RunSpec
from training.state import TrainingState

# Of an epoch, beside the sums of its metrics.
SECONDS, NUM_STEPS, NUM_SKIPPED = "seconds", "num_steps", "num_skipped"


@dataclass
class Progress:
    """Where training stands, for people: sent every few seconds by rank 0."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_s: float
    eta_s: float


class Meter:
    """Collects what one epoch measured; what an interrupted attempt had measured of it, `so_far`, is gone on with."""

    def __init__(self, spec: RunSpec, steps_per_epoch: int, state: TrainingState) -> None:
        self.spec, self.steps_per_epoch = spec, steps_per_epoch
        self.sums = dict(state.so_far)
        self._first_step = state.step
        self._seconds_before = self.sums.pop(SECONDS, 0.0)
        self._num_steps = self.sums.pop(NUM_STEPS, 0.0)
        self._num_skipped = self.sums.pop(NUM_SKIPPED, 0.0)
        self.loss = float("nan")
        self.started = self.last_news = time.monotonic()

    def update(self, terms: Mapping[str, float], extra: Mapping[str, float]) -> None:
        """Add one step's loss terms and the criterion's own metrics."""
        self.loss = sum(terms.values())
        losses = {f"train/loss_{name}": value for name, value in terms.items()}
        for name, value in (losses | {f"train/{name}": value for name, value in extra.items()}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["train/loss"] = self.sums.get("train/loss", 0.0) + self.loss
        self._num_steps += 1

    def skip(self) -> None:
        """Count a step whose loss was not finite."""
        self._num_skipped += 1

    @property
    def seconds(self) -> float:
        """How long the epoch has taken, without what was lost."""
        return self._seconds_before + time.monotonic() - self.started

    def so_far(self) -> dict[str, float]:
        """What a checkpoint within the epoch keeps."""
        return self.sums | {SECONDS: self.seconds, NUM_STEPS: self._num_steps, NUM_SKIPPED: self._num_skipped}

    def means(self) -> dict[str, float]:
        """Means over the epoch's steps, as metrics `train/...`."""
        means = {name: value / max(self._num_steps, 1) for name, value in self.sums.items()}
        return means | {"train/non_finite_steps": self._num_skipped}

    def news(self, state: TrainingState, every_s: float = 5.0) -> Progress | None:
        """A progress report if the last one is old enough or the epoch ends."""
        now = time.monotonic()
        if now - self.last_news < every_s and state.steps_in_epoch < self.steps_per_epoch:
            return None
        self.last_news = now
        training = self.spec.training
        seconds_per_step = (now - self.started) / (state.step - self._first_step)
        total = training.epochs * self.steps_per_epoch
        return Progress(
            epoch=state.epoch + 1, epochs=training.epochs, step=state.step, steps=total, loss=self.loss,
            images_per_s=training.batch_size / seconds_per_step, eta_s=(total - state.step) * seconds_per_step,
        )  # fmt: skip

"""Running means of one epoch, and the pace of the run."""

from __future__ import annotations

import time
from dataclasses import dataclass

from training.spec import RunSpec
from training.state import TrainingState

# Starts every line of a worker's output that is meant for people.
PROGRESS_MARK = "[speck]"
ERROR_MARK = "error:"


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
    """Collects what one epoch measured."""

    def __init__(self, spec: RunSpec, steps_per_epoch: int, first_step: int) -> None:
        self.spec, self.steps_per_epoch, self.first_step = spec, steps_per_epoch, first_step
        self.sums: dict[str, float] = {}
        self.num_steps = 0
        self.non_finite_steps = 0
        self.data_wait_s = 0.0
        self.loss = float("nan")
        self.started = self.last_news = time.monotonic()

    def update(self, terms: dict[str, float], extra: dict[str, float]) -> None:
        """Add one step's loss terms and the criterion's own metrics."""
        self.loss = sum(terms.values())
        for name, value in (
            {f"train/loss_{k}": v for k, v in terms.items()} | {f"train/{k}": v for k, v in extra.items()}
        ).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["train/loss"] = self.sums.get("train/loss", 0.0) + self.loss
        self.num_steps += 1

    def means(self) -> dict[str, float]:
        """Means over the epoch's steps, as metrics `train/...`."""
        means = {name: value / max(self.num_steps, 1) for name, value in self.sums.items()}
        return means | {"train/non_finite_steps": float(self.non_finite_steps), "time/data_wait_s": self.data_wait_s}

    def news(self, state: TrainingState, every_s: float = 5.0) -> Progress | None:
        """A progress report if the last one is old enough or the epoch ends."""
        now = time.monotonic()
        done = state.step - self.first_step
        if now - self.last_news < every_s and done < self.steps_per_epoch:
            return None
        self.last_news = now
        training = self.spec.training
        seconds_per_step = (now - self.started) / done
        total = training.epochs * self.steps_per_epoch
        return Progress(
            epoch=state.epoch + 1, epochs=training.epochs, step=state.step, steps=total, loss=self.loss,
            images_per_s=training.batch_size / seconds_per_step, eta_s=(total - state.step) * seconds_per_step,
        )  # fmt: skip

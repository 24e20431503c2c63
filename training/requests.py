"""What the surroundings ask of a training while it runs; all workers agree on it within the step's all-reduce."""

from __future__ import annotations

from typing import NamedTuple


class Asked(NamedTuple):
    """`checkpoint`: write one now. `leave`: this worker is taken away. `stop`: the run is to end here."""

    checkpoint: bool = False
    leave: bool = False
    stop: bool = False


class Preempted(RuntimeError):
    """A worker has to leave its machine. What was reached is in a checkpoint; the others go on without it."""


class Stopped(RuntimeError):
    """The run was asked to end early. What was reached is in a checkpoint, from which a later attempt goes on."""

"""What ends a run before its last epoch; without torch, for Ray's driver and controller, which judge it, do without."""

from __future__ import annotations


class Diverged(RuntimeError):
    """The loss was not finite for too many steps in a row, or weights are not."""


class MiscountedImages(RuntimeError):
    """Of a split, images or tiles were detected on twice or not at all."""


class Preempted(RuntimeError):
    """A worker has to leave its machine. What was reached is in a checkpoint; the others go on without it."""


class Stopped(RuntimeError):
    """The run was asked to end early. What was reached is in a checkpoint, from which a later attempt goes on."""

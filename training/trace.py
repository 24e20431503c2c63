"""A trace of a few training steps, as Chrome's tracing page and Perfetto show it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

TRACE = "trace.json.gz"
# The steps before are slower than all others: caches fill, kernels are chosen, and the profiler itself starts.
NUM_SKIPPED, NUM_WARMUP, NUM_TRACED = 2, 1, 3
NUM_STEPS = NUM_SKIPPED + NUM_WARMUP + NUM_TRACED


class StepTrace:
    """Traces NUM_TRACED steps of this process, all of one epoch, the first that is long enough, into a file.

    A few MiB, for no shapes and no stacks are kept. `say` is told where there is no room for it.
    """

    def __init__(self, path: Path, *, on_gpu: bool, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        steps = schedule(wait=NUM_SKIPPED, warmup=NUM_WARMUP, active=NUM_TRACED, repeat=1)
        self._profiler = profile(activities=activities, schedule=steps, on_trace_ready=self._write)
        self._num_steps: int | None = None

    def stepped(self, steps_left: int) -> None:
        """A step is done, and the epoch has so many left. In the thread that trains."""
        if self._num_steps is None:
            if steps_left >= NUM_STEPS:
                self._profiler.start()
                self._num_steps = 0
        elif self._num_steps < NUM_STEPS:
            self._profiler.step()
            self._num_steps += 1
            if self._num_steps == NUM_STEPS:
                self._profiler.stop()

    def close(self) -> None:
        """Stop where training ended early."""
        if self._num_steps is None:
            self._say(f"no trace: no epoch had more than {NUM_STEPS} steps")
        elif self._num_steps < NUM_STEPS:
            self._profiler.stop()
        self._num_steps = NUM_STEPS

    def _write(self, profiler: profile) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except OSError as error:
            with suppress(OSError):
                self._path.unlink()
            self._say(f"no trace: {error}")

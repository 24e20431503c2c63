"""What Prefect's page of a cell shows beside its log: how far it is, and links to its pages in MLflow and Ray.

Whatever becomes of them, the cell goes on: what fails here is left out.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

UPDATE_EVERY_S = 5.0
# As `training.run` says it.
_NEWS = re.compile(r"(epoch \d+/\d+) step (\d+)/(\d+) .*(ETA \S+)$")


class CellPage:
    """The artifacts of the present task run, which works on one cell."""

    def __init__(self, run_key: str, title: str) -> None:
        self._run_key, self._title = run_key, title
        self._progress: UUID | None = None
        self._updated = 0.0
        self._links: set[str] = set()
        # Artifacts belong to the task run in whose thread they are made; outside of one there is nothing to show.
        self._is_shown = TaskRunContext.get() is not None

    def tell(self, line: str) -> None:
        """Take how far the training is from a line of its job, and show it every UPDATE_EVERY_S."""
        if (news := progress(line)) is not None:
            self._show(*news)

    def done(self) -> None:
        """The cell has its result."""
        self._show(100.0, "trained and scored", at_once=True)

    def link(self, what: str, url: str | None) -> None:
        """Show a link to the cell's page elsewhere, once; None where there is no such page."""
        if url is None or what in self._links or not self._is_shown:
            return
        with suppress(Exception):
            create_link_artifact(
                url, f"{self._title} in {what}", key=f"{what.lower()}-{self._run_key}", description=self._title
            )
            self._links.add(what)

    def _show(self, percent: float, description: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self._is_shown or (now - self._updated < UPDATE_EVERY_S and not at_once):
            return
        self._updated = now
        with suppress(Exception):
            if self._progress is None:
                created: Any = create_progress_artifact(percent, f"progress-{self._run_key}", description)
                self._progress = created
            else:
                update_progress_artifact(self._progress, percent, description=description)


def progress(line: str) -> tuple[float, str] | None:
    """How much of the training is done, 0..100, and how long it will take, by a line of news; None for other lines."""
    if (found := _NEWS.match(line)) is None:
        return None
    epoch, step, steps, eta = found.groups()
    return 100 * int(step) / int(steps), f"{eta}, {epoch}"

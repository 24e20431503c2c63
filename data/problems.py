"""`Problem`: one thing wrong with a dataset, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_SHOWN = 50


@dataclass(frozen=True)
class Problem:
    """`rule` says what was found and what is allowed, `remedy` what to do.

    An `error` stops preparation; a `warning` is mended or left out there, and counted. `line` and `column` count from
    1; a fault of a whole file has no line, one of a whole line no column.
    """

    path: Path
    line: int | None
    rule: str
    remedy: str
    severity: Literal["error", "warning"] = "error"
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.path, self.line, self.column) if part is not None)
        return f"{place}: {self.severity}: {self.rule}. {self.remedy}"


class ImportRefused(ValueError):
    """What cannot be taken in as raw data: the wrong place, an unsound archive, no format that we know."""


class InvalidDataset(ValueError):
    """A dataset has errors; the message lists them, `problems` holds them all."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(listing(self.problems))


def listing(problems: Sequence[Problem]) -> str:
    """Return one problem a line, errors first, at most MAX_SHOWN, with the number of the rest."""
    ordered = sorted(problems, key=lambda problem: problem.severity != "error")
    lines = [str(problem) for problem in ordered[:MAX_SHOWN]]
    if len(ordered) > MAX_SHOWN:
        lines.append(f"... and {len(ordered) - MAX_SHOWN} more")
    return "\n".join(lines)

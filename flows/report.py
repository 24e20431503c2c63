"""What a `train-all` did, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass

from flows.leaderboard import Row
from flows.promote import Promotion


@dataclass(frozen=True)
class Report:
    """Leaderboard, what was promoted, by dataset why not, and the seconds of its parts."""

    rows: list[Row]
    promotions: list[Promotion]
    not_promoted: dict[str, str]
    seconds: dict[str, float]

    @property
    def failed(self) -> list[Row]:
        """Rows without a result."""
        return [row for row in self.rows if row.error is not None]


class Unfinished(RuntimeError):
    """Some cells have no result, or a dataset's best cell could not be promoted; what is done stays done."""

    def __init__(self, report: Report) -> None:
        self.report = report
        faults = [f"{row.title}: {row.error}" for row in report.failed]
        faults += [f"nothing promoted for {name}: {reason}" for name, reason in report.not_promoted.items()]
        num_stopped = sum(row.state == "stopped" for row in report.failed)
        what = f"{len(report.failed) - num_stopped} of {len(report.rows)} cells failed"
        left = f", {num_stopped} are left for the next run" if num_stopped else ""
        super().__init__(f"{what}{left}. " + "; ".join(faults))

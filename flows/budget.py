"""What one run of the matrix may spend; when that is gone it ends in order, and the next run goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from training.ledger import Account, read_ledger
from training.store import StorageUnavailable

# Jobs write what they hold every half minute.
LOOK_EVERY_S = 10.0


class BudgetSpent(RuntimeError):
    """A cell was not started, or was stopped at a checkpoint, because the budget of the run is spent."""


class Budget(BaseModel):
    """Limits of one run over all its cells; None is no limit.

    `accelerator_hours`: of GPUs, or of CPUs where there are none, that workers hold. `price`: of these hours, by
    `compute.price_per_hour`, in its currency. `wall_hours`: since the first cell could start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    accelerator_hours: float | None = Field(None, gt=0)
    price: float | None = Field(None, gt=0)
    wall_hours: float | None = Field(None, gt=0)


class Purse:
    """Says when a budget is spent, from the ledgers of the cells; what was held before now is not counted."""

    def __init__(
        self, budget: Budget, storage: Path, run_keys: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget, self._storage, self._run_keys, self._clock = budget, storage, run_keys, clock
        self._started = self._looked = clock()
        self._before = self._held() if self._counts_ledgers else (0.0, 0.0)
        self._spent: str | None = None

    def spent(self) -> str | None:
        """What is spent and how much that was; None while nothing is. Reads the ledgers every LOOK_EVERY_S."""
        now = self._clock()
        if self._spent is None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._spent = self._exceeded((now - self._started) / 3600)
        return self._spent

    @property
    def _counts_ledgers(self) -> bool:
        return self._budget.accelerator_hours is not None or self._budget.price is not None

    def _exceeded(self, wall_hours: float) -> str | None:
        hours, price = (now - before for now, before in zip(self._held(), self._before, strict=True))
        for name, spent in (("wall_hours", wall_hours), ("accelerator_hours", hours), ("price", price)):
            limit = getattr(self._budget, name)
            if limit is not None and spent >= limit:
                return f"budget.{name} of {limit:g} is spent ({spent:.3g})"
        return None

    def _held(self) -> tuple[float, float]:
        """Accelerator-hours and price that all cells have held so far."""
        starts: list[Account] = []
        for run_key in self._run_keys if self._counts_ledgers else ():
            with suppress(StorageUnavailable):
                if (ledger := read_ledger(self._storage / run_key)) is not None:
                    starts += ledger.starts
        # An earlier start may have had no price: that of the others counts all the same.
        return sum(start.held_s for start in starts) / 3600, sum(start.price or 0.0 for start in starts)

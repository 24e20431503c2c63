"""The comparison of all cells: tables for the terminal, JSON for programs, Markdown for Prefect and MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from flows.budget import BudgetSpent
from flows.cells import CellOutcome
from flows.plan import PlannedCell
from training.jobs import CellFailed
from training.ledger import Ledger
from training.spec import ArchitectureSpec

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "architecture", "seed", "val AP", "test AP", "AP50", "AP small", "time", "estimated", "disk", "cost (useful)",
    "state", "",
)  # fmt: skip
SCORES = ("val_ap", "test_ap", "test_ap50", "test_ap_small")


@dataclass(frozen=True)
class Row:
    """One cell: scores are COCO's, on test unless the name says val; `error` says why there are none. Its state is
    `failed` then, or `stopped` where the budget was spent.

    `label` is the architecture with what differs from its own settings.

    `wall_s` is what this run spent on it, None where it was reused; `trained_s` is what its training took whenever it
    was. `cpu_hours`, or where it had GPUs `gpu_hours`, are what the workers of all its attempts held, `useful_share` of
    them for epochs that count and `num_starts` times begun; see `training.ledger`.
    """

    dataset: str
    architecture: str
    label: str
    seed: int
    run_key: str
    state: str
    val_ap: float | None = None
    test_ap: float | None = None
    test_ap50: float | None = None
    test_ap_small: float | None = None
    wall_s: float | None = None
    estimated_s: float | None = None
    disk_bytes: int = 0
    estimated_disk_bytes: int | None = None
    trained_s: float | None = None
    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    useful_share: float | None = None
    num_starts: int = 0
    price: float | None = None
    champion: bool = False
    error: str | None = None

    @property
    def title(self) -> str:
        """Name for people: architecture, dataset, seed."""
        return f"{self.label} / {self.dataset} / seed {self.seed}"


@dataclass(frozen=True)
class Summary:
    """A labelled architecture on a dataset over its seeds: mean, and sample standard deviation from two seeds on."""

    dataset: str
    architecture: str
    label: str
    num_seeds: int
    num_failed: int
    mean: dict[str, float]
    spread: dict[str, float]


def make_rows(
    cells: Sequence[tuple[PlannedCell, CellOutcome | Exception]], champions: set[str], ledgers: Mapping[str, Ledger]
) -> list[Row]:
    """One row a cell; `champions` are MLflow runs, `ledgers` by run key."""
    rows = []
    for cell, outcome in cells:
        spec, estimate = cell.spec, cell.estimate
        common: dict[str, Any] = {
            "dataset": spec.dataset.name,
            "architecture": spec.architecture.name,
            "label": spec.architecture.label,
            "seed": spec.seed,
            "run_key": spec.run_key,
            "estimated_s": None if estimate is None else estimate.seconds,
            "estimated_disk_bytes": None if estimate is None else estimate.disk_bytes,
            **_held(ledgers.get(spec.run_key)),
        }
        if isinstance(outcome, Exception):
            wall_s = outcome.job_s or None if isinstance(outcome, CellFailed) else None
            state = "stopped" if isinstance(outcome, BudgetSpent) else "failed"
            rows.append(Row(**common, wall_s=wall_s, state=state, error=_first_line(outcome)))
            continue
        val, test = outcome.result.scores["val"].metrics, outcome.result.scores["test"].metrics
        rows.append(
            Row(
                **common,
                wall_s=outcome.seconds.get("wall"),
                state=_done(cell, outcome),
                val_ap=val["coco/AP"],
                test_ap=test["coco/AP"],
                test_ap50=test["coco/AP50"],
                test_ap_small=test["coco/AP_small"],
                disk_bytes=outcome.disk_bytes,
                trained_s=outcome.result.seconds["job"],
                champion=outcome.run_id in champions,
            )
        )
    return rows


def unplanned_rows(
    dataset: str, architectures: Iterable[ArchitectureSpec], seeds: Sequence[int], error: Exception
) -> list[Row]:
    """Rows of cells that could not even be planned, because their dataset could not be versioned."""
    reason = _first_line(error)
    return [
        Row(dataset, architecture.name, architecture.label, seed, run_key="", state="failed", error=reason)
        for architecture in architectures
        for seed in seeds
    ]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By dataset, then architectures by their mean validation AP, best first, then seeds."""
    rows = list(rows)
    mean = {(each.dataset, each.label): each.mean.get("val_ap", -1.0) for each in summarise_seeds(rows)}
    return sorted(rows, key=lambda r: (r.dataset, -mean[r.dataset, r.label], r.label, r.seed))


def summarise_seeds(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each dataset and labelled architecture, in the order of their names."""

    def kind(row: Row) -> tuple[str, str, str]:
        return row.dataset, row.architecture, row.label

    summaries = []
    for (dataset, architecture, label), group in groupby(sorted(rows, key=kind), kind):
        cells = list(group)
        values = {name: [getattr(row, name) for row in cells if getattr(row, name) is not None] for name in SCORES}
        summaries.append(
            Summary(
                dataset, architecture, label, len(cells), sum(row.error is not None for row in cells),
                mean={name: statistics.fmean(found) for name, found in values.items() if found},
                spread={name: statistics.stdev(found) for name, found in values.items() if len(found) > 1},
            )
        )  # fmt: skip
    return summaries


def as_tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each dataset, for the terminal."""
    from rich.table import Table

    tables = []
    for dataset, lines in _lines(rows):
        table = Table(title=f"{dataset} (COCO protocol; selected on val, promoted on test)", title_justify="left")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if 1 <= index <= 9 else "left")
        for line in lines:
            table.add_row(*line)
        tables.append(table)
    return tables


def as_markdown(rows: Sequence[Row]) -> str:
    """One Markdown table for all datasets."""
    header = ("dataset", *COLUMNS)
    lines = [(dataset, *line) for dataset, group in _lines(rows) for line in group]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def as_json(rows: Sequence[Row]) -> dict[str, list[dict[str, object]]]:
    """Plain values: every cell in `rows`, means and spreads over seeds in `summary`."""
    return {"rows": [asdict(row) for row in rows], "summary": [asdict(each) for each in summarise_seeds(rows)]}


def flat_summaries(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Means and spreads over seeds as one flat row each, with columns like `val_ap` and `val_ap_spread`."""
    flat = []
    for each in summarise_seeds(rows):
        values: dict[str, object] = {name: each.mean.get(name) for name in SCORES}
        values |= {f"{name}_spread": each.spread.get(name) for name in SCORES}
        counts = {"num_seeds": each.num_seeds, "num_failed": each.num_failed}
        flat.append({"dataset": each.dataset, "architecture": each.label, **counts, **values})
    return flat


def spent(rows: Sequence[Row]) -> str:
    """One sentence: what was trained, what was reused and what that saved, and what all of it has cost."""
    trained = [row for row in rows if row.wall_s is not None and row.error is None]
    reused = [row for row in rows if row.wall_s is None and row.error is None]
    stopped = [row for row in rows if row.state == "stopped"]
    failed = [row for row in rows if row.error is not None and row not in stopped]
    estimated = [row.estimated_s for row in trained if row.estimated_s is not None]
    parts = []
    if trained:
        whole = f" (estimated {sum(estimated):.0f} s)" if len(estimated) == len(trained) else ""
        took = sum(row.wall_s or 0.0 for row in trained)
        parts.append(f"{len(trained)} trained in {took:.0f} cell-seconds{whole}")
    if reused:
        parts.append(f"{len(reused)} reused, which saved {sum(row.trained_s or 0.0 for row in reused):.0f} s")
    if failed:
        after = f" after {sum(row.wall_s or 0.0 for row in failed):.0f} s"
        parts.append(f"{len(failed)} failed{after if any(row.wall_s for row in failed) else ''}")
    if stopped:
        parts.append(f"{len(stopped)} left for the next run, because the budget is spent")
    if any(row.num_starts for row in rows):
        parts.append(f"cost of all attempts (useful): {_cost(rows)}")
    return f"{len(rows)} {'cell' if len(rows) == 1 else 'cells'}: {'; '.join(parts)}"


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Table lines by dataset: one a cell, and one for the mean where there are several seeds."""
    summaries = {(each.dataset, each.label): each for each in summarise_seeds(rows)}
    found = []
    for dataset, group in groupby(ordered(rows), lambda row: row.dataset):
        lines: list[tuple[str, ...]] = []
        for label, seeds in groupby(group, lambda row: row.label):
            cells = list(seeds)
            if len(cells) > 1:
                lines.append(_summary_line(summaries[dataset, label], cells))
            lines += [_cell_line(row) for row in cells]
        found.append((dataset, lines))
    return found


def _summary_line(summary: Summary, cells: Sequence[Row]) -> tuple[str, ...]:
    scores = []
    for name in SCORES:
        spread = f" ±{summary.spread[name]:.3f}" if name in summary.spread else ""
        scores.append(f"{summary.mean[name]:.3f}{spread}" if name in summary.mean else "-")
    count = f"mean of {summary.num_seeds - summary.num_failed}"
    walls = [row.wall_s for row in cells if row.wall_s is not None]
    estimates = [row.estimated_s for row in cells if row.estimated_s is not None]
    time, estimated = _seconds(sum(walls) if walls else None), _seconds(sum(estimates) if estimates else None)
    return (summary.label, count, *scores, time, estimated, "", _cost(cells), "", "")


def _cell_line(row: Row) -> tuple[str, ...]:
    scores = ["-" if value is None else f"{value:.3f}" for value in (getattr(row, name) for name in SCORES)]
    times = (_seconds(row.wall_s), _seconds(row.estimated_s))
    remark = (row.error or ("champion" if row.champion else "")).replace("|", "/")
    state = f"{row.state} {row.run_key}".strip()
    return (row.label, str(row.seed), *scores, *times, _disk(row), _cost([row]), state, remark)


def _held(ledger: Ledger | None) -> dict[str, Any]:
    if ledger is None:
        return {}
    total = ledger.total
    return {
        f"{ledger.accelerator.lower()}_hours": total.held_s / 3600,
        "useful_share": total.useful_share,
        "num_starts": total.num_starts,
        "price": total.price,
    }


def _done(cell: PlannedCell, outcome: CellOutcome) -> str:
    if outcome.reused:
        return "rescored" if cell.state == "score" else "stale" if cell.state == "stale" else "cached"
    return "resumed" if cell.state == "resume" else "trained"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"


def _disk(row: Row) -> str:
    """MiB taken, and in brackets what was expected."""
    expected = "" if row.estimated_disk_bytes is None else f" ({row.estimated_disk_bytes / 2**20:.0f})"
    return f"{row.disk_bytes / 2**20:.0f}{expected} MiB" if row.disk_bytes else "-"


def _cost(rows: Sequence[Row]) -> str:
    """Hours of GPUs where any were held, else of CPUs, how much of them was useful, and the price if all have one."""
    on_gpu = any(row.gpu_hours for row in rows)
    hours = [row.gpu_hours if on_gpu else row.cpu_hours for row in rows]
    if not sum(hours):
        return "-"
    useful = sum(held * (row.useful_share or 0.0) for held, row in zip(hours, rows, strict=True)) / sum(hours)
    prices = [row.price for row in rows if row.num_starts]
    price = f"{sum(known):.2f} for " if len(known := [one for one in prices if one is not None]) == len(prices) else ""
    return f"{price}{sum(hours):.2f} {'GPU' if on_gpu else 'CPU'}-h ({useful:.0%})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)

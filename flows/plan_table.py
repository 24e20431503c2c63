"""The plan as people read it, and as programs do."""

from __future__ import annotations

from collections.abc import Sequence

from flows.plan import PlannedCell


def line(cell: PlannedCell) -> str:
    """One line: what will happen to a cell, why, how long and how much disk."""
    weights = cell.spec.training.warm_start
    start = "" if weights is None else f", from weights {weights.removeprefix('sha256:')[:12]}"
    if cell.warm_share is not None:
        start += f", which have {cell.warm_share:.0%} of it"
    return f"{cell.spec.title}: {cell.state} ({cell.spec.run_key}{start}): {cell.why}{_expected(cell)}"


def total(cells: Sequence[PlannedCell]) -> str:
    """One line about the whole plan."""
    training = [cell for cell in cells if cell.trains]
    known = [cell.estimate for cell in training if cell.estimate is not None]
    text = f"{len(cells)} cell{'s' * (len(cells) != 1)}, {len(training)} to train"
    if known:
        disk_mib = sum(estimate.disk_bytes for estimate in known) / 2**20
        text += (
            f": about {_duration(sum(estimate.seconds for estimate in known))} one after the other, {disk_mib:.0f} MiB"
        )
    if len(known) < len(training):
        text += f"; nothing is known about {len(training) - len(known)} of them"
    return text


def as_markdown(cells: Sequence[PlannedCell]) -> str:
    """A Markdown table."""
    rows = [["cell", "state", "why", "time", "disk", "estimated from", "dataset version"], ["---"] * 7]
    for cell in cells:
        estimate = cell.estimate
        expected = ["-"] * 3
        if estimate is not None:
            expected = [_duration(estimate.seconds), f"{estimate.disk_bytes / 2**20:.0f} MiB", estimate.source]
        rows.append([cell.spec.title, cell.state, cell.why, *expected, cell.spec.dataset.version[:12]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{total(cells)}"


def as_json(cells: Sequence[PlannedCell]) -> list[dict[str, object]]:
    """Plain values."""
    return [
        {
            "run_key": cell.spec.run_key,
            "architecture": cell.spec.architecture.name,
            "settings": cell.spec.architecture.settings,
            "dataset": cell.spec.dataset.name,
            "dataset_version": cell.spec.dataset.version,
            "seed": cell.spec.seed,
            "warm_start": cell.spec.training.warm_start,
            "warm_start_share": cell.warm_share,
            "state": cell.state,
            "why": cell.why,
            "estimated_s": None if cell.estimate is None else cell.estimate.seconds,
            "estimated_disk_bytes": None if cell.estimate is None else cell.estimate.disk_bytes,
            "estimated_from": None if cell.estimate is None else cell.estimate.source,
        }
        for cell in cells
    ]


def _expected(cell: PlannedCell) -> str:
    if cell.estimate is None:
        return ""
    size_mib = cell.estimate.disk_bytes / 2**20
    return f"; about {_duration(cell.estimate.seconds)}, {size_mib:.0f} MiB (from {cell.estimate.source})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d} min"

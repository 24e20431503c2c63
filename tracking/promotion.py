"""Whether a challenger becomes champion: a pure function of scores, no MLflow."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One scored model: `score` is `metric` (higher is better) on the test split of `dataset_version`.

    `training` names it: a run key, or a later training of one.
    """

    training: str
    dataset_version: str
    protocol: str
    metric: str
    score: float | None


@dataclass(frozen=True)
class GateRow:
    """One condition: what it demands, what both sides have, and whether the candidate passes."""

    gate: str
    threshold: str
    champion: str
    candidate: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """`promote` is true when every row passed; `reason` is one sentence for the ledger."""

    promote: bool
    reason: str
    rows: list[GateRow]


def decide(candidate: Candidate, champion: Candidate | None) -> Verdict:
    """Promotes a candidate with a finite score that strictly beats the champion's on the same test version and metric.

    Never promotes across test versions, protocols or metrics: re-score the champion first, then decide again.
    """
    rows = [_row("finite score", "finite", champion, candidate, "score", _finite(candidate.score))]
    if not _finite(candidate.score):
        return Verdict(False, f"{candidate.training} has no finite {candidate.metric}: {candidate.score}", rows)
    if champion is None:
        found = "" if candidate.score else ", though it found nothing: train longer"
        return Verdict(
            True, f"{candidate.training} is the first model with a {candidate.metric} on this dataset{found}", rows
        )
    if candidate.training == champion.training:
        return Verdict(False, f"{candidate.training} already is the champion", rows)
    for field in ("dataset_version", "protocol", "metric"):
        same = getattr(candidate, field) == getattr(champion, field)
        rows.append(_row(f"same {field.replace('_', ' ')}", "equal", champion, candidate, field, same))
    rows.append(_row("champion scored", "finite", champion, candidate, "score", _finite(champion.score)))
    if not all(row.passed for row in rows):
        failed = ", ".join(row.gate for row in rows if not row.passed)
        return Verdict(
            False, f"not comparable ({failed}): score champion {champion.training} as the candidate was", rows
        )
    assert candidate.score is not None
    assert champion.score is not None
    better = candidate.score > champion.score
    rows.append(_row("superior", f"> {champion.score:.6g}", champion, candidate, "score", better))
    relation = "beats" if better else "does not beat"
    reason = f"{candidate.metric} {candidate.score:.6g} {relation} champion {champion.training}'s {champion.score:.6g}"
    return Verdict(better, reason, rows)


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _row(
    gate: str, threshold: str, champion: Candidate | None, candidate: Candidate, field: str, passed: bool
) -> GateRow:
    old, new = ("none" if side is None else _shown(getattr(side, field)) for side in (champion, candidate))
    return GateRow(gate, threshold, champion=old, candidate=new, passed=passed)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)

"""A run's attempts, told from its records: when, by which code, on which machines, from where on, to which end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from training.ledger import Usage, read_usages
from training.machines import in_words
from training.records import RunResult, attempt_numbers, read_attempt, read_ending

# A tag has its limits; all of them are in the artifact.
MAX_RESUMED = 20


def attempts_of(run_folder: Path, result: RunResult | None) -> list[dict[str, Any]]:
    """Every attempt as plain values, in order; `result`: the run's, if there is one."""
    starts: dict[int, list[Usage]] = {}
    for usage in read_usages(run_folder):
        starts.setdefault(usage.attempt, []).append(usage)
    numbers = attempt_numbers(run_folder)
    return [
        {"number": number, **_told(run_folder, number, starts.get(number, []))}
        | _ending(run_folder, number, result, is_latest=number == numbers[-1])
        for number in numbers
    ]


def as_tags(attempts: list[dict[str, Any]]) -> dict[str, str]:
    """The attempts in a few words each, as tags of an MLflow run."""
    latest = attempts[-1]
    starts = [start for attempt in attempts for start in attempt["starts"]]
    resumed = [
        f"step {start['resumed_step']} in attempt {attempt['number']}"
        for attempt in attempts
        for start in attempt["starts"]
        if start["resumed_step"]
    ]
    tags = {"speck.attempts": str(len(attempts)), "speck.ending": latest["ending"]}
    tags |= {"speck.resumed_from": ", ".join(resumed[-MAX_RESUMED:])} if resumed else {}
    machines = [start["machines"] for start in starts if start["machines"]]
    return tags | ({"speck.machines": machines[-1]} if machines else {})


def _told(run_folder: Path, number: int, starts: list[Usage]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    # A damaged record of one attempt must not cost what is known of the others.
    with suppress(ValueError):
        attempt = read_attempt(run_folder, number)
        told = {"submitted_ms": attempt.submitted_ms, "code_hash": attempt.code_hash, **attempt.provenance}
    told["starts"] = [
        {
            "started_ms": usage.started_ms,
            "last_ms": usage.last_ms,
            "workers": usage.workers,
            "resumed_step": usage.resumed_step,
            "machines": in_words(usage.nodes),
            "nodes": [node.model_dump(mode="json") for node in usage.nodes],
        }
        for usage in starts
    ]
    return told


def _ending(run_folder: Path, number: int, result: RunResult | None, *, is_latest: bool) -> dict[str, Any]:
    if result is not None and result.attempts == number:
        return {"ending": "finished", "ended_ms": result.finished_ms}
    ending = read_ending(run_folder, number)
    if ending is not None:
        return {"ending": f"{ending.status.lower()}: {ending.cause}", "ended_ms": ending.ended_ms}
    return {"ending": "under way, or nobody saw it end" if is_latest else "nobody saw it end", "ended_ms": None}

"""Whether a candidate becomes champion: a pure function of what is known of both and of the gates, no MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Of the test split that must be left once what the champion was trained on is left out.
MIN_SHARE_LEFT = 0.5

Score = Annotated[float, Field(ge=0, le=1)]


class Gates(BaseModel):
    """What a dataset asks of a new champion; `flows/gates/default.yaml` explains the keys and holds their defaults.

    `protocol`: what the dataset's card and `max_dets` say about counting, as one text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    protocol: str
    max_dets: int = Field(ge=1)
    metric: str
    rule: Literal["superior", "non_inferior"]
    margin: float | None = Field(gt=0, lt=1)
    confidence: float = Field(ge=0.5, lt=1)
    floors: dict[str, Score]
    max_drop: dict[str, Score]
    class_floors: dict[str, Score]
    max_class_drop: Score | None
    min_test_images: int | None = Field(ge=1)
    max_size_mib: float | None = Field(gt=0)
    max_latency_ms: float | None = Field(gt=0)
    max_latency_ratio: float | None = Field(gt=0)
    other_classes: bool
    approval: bool

    @model_validator(mode="after")
    def _margin_belongs_to_non_inferior(self) -> Self:
        if (self.rule == "non_inferior") != (self.margin is not None):
            raise ValueError(f"rule non_inferior needs a margin, superior has none; got {self.rule}, {self.margin}")
        return self

    @property
    def needs_latency(self) -> bool:
        """Whether some gate asks how long a picture takes."""
        return self.max_latency_ms is not None or self.max_latency_ratio is not None


@dataclass(frozen=True)
class Gain:
    """The candidate's metric less the champion's; `confidence` of the resampled test sets lie from `low` to `high`.

    `drawn`: of what these consist, such as `120 images`.
    """

    difference: float
    low: float
    high: float
    confidence: float
    drawn: str

    @property
    def shown(self) -> str:
        """The difference and its interval."""
        return f"{self.difference:+.4f}, {self.confidence:.0%} within {self.low:+.4f} to {self.high:+.4f}"


@dataclass(frozen=True)
class Side:
    """What is known of a model. `training` names it: a run key, or a later training of one.

    `metrics` by name, `per_class` the gates' metric by class; None where test has no such object. Those of both sides
    are of the same pictures: of `num_images` that the model was scored on, those that neither was trained on.
    `num_split`: pictures in the test split of its own dataset version. `seen`: test pictures of the candidate's version
    that this model was trained or selected on. `faults`: what lacks in its lineage or contradicts it; `non_finite`:
    what is not a number. `latency_ms`: 95th percentile for a picture.
    """

    training: str
    dataset_version: str
    protocol: str
    classes: tuple[str, ...]
    metrics: Mapping[str, float | None]
    per_class: Mapping[str, float | None]
    num_images: int
    num_split: int
    size_bytes: int
    seen: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    non_finite: tuple[str, ...] = ()
    latency_ms: float | None = None


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
    """`promote` is true when every row passed; `reason` is one sentence for the ledger.

    `sound`: what is known of the candidate can be trusted, so that a later one may be measured against it.
    """

    promote: bool
    sound: bool
    reason: str
    rows: tuple[GateRow, ...]


def decide(candidate: Side, champion: Side | None, gates: Gates, gain: Gain | None = None) -> Verdict:
    """Promotes a sound candidate that passes every gate; without a champion those that need none.

    `gain`: by paired bootstrap on the pictures that both are judged by; None where that cannot be resampled. A
    candidate is sound if its lineage is complete, its numbers are finite and its score is one of the whole test split,
    under the dataset's protocol, on pictures that it was not trained on.
    """
    soundness = list(_soundness(candidate, champion, gates))
    is_sound = all(row.passed for row in soundness)
    rows = [*soundness, *_floors(candidate, champion, gates), *_budgets(candidate, champion, gates)]
    if champion is not None:
        rows += _comparison(candidate, champion, gates, gain)
    failed = [row for row in rows if not row.passed]
    if failed:
        reason = "; ".join(f"{row.gate}: {row.candidate}, asked: {row.threshold}" for row in failed)
    elif champion is None:
        score = candidate.metrics.get(gates.metric)
        found = "" if score else ", though it found nothing: train longer"
        reason = f"no champion to compare with: {gates.metric} {_shown(score)}{found}"
    else:
        reason = f"{rows[-1].gate}: {rows[-1].candidate}"
    if champion is not None:
        reason += f"; champion {champion.training} has {_shown(champion.metrics.get(gates.metric))}"
    return Verdict(not failed, is_sound, reason, tuple(rows))


def _soundness(candidate: Side, champion: Side | None, gates: Gates) -> Iterator[GateRow]:
    yield GateRow("lineage", "complete", "", "; ".join(candidate.faults) or "complete", not candidate.faults)
    non_finite = list(candidate.non_finite)
    score = candidate.metrics.get(gates.metric)
    if score is None or not math.isfinite(score):
        non_finite.append(f"{gates.metric} is {score}")
    yield GateRow("finite", "weights and scores", "", "; ".join(non_finite) or "finite", not non_finite)
    yield GateRow("protocol", gates.protocol, "", candidate.protocol, candidate.protocol == gates.protocol)
    least = max(candidate.num_split, gates.min_test_images or (champion.num_split if champion else 0))
    yield GateRow(
        "test pictures",
        f"at least {least}",
        "none" if champion is None else str(champion.num_split),
        str(candidate.num_images),
        candidate.num_images >= least,
    )
    yield GateRow(
        "test pictures trained on",
        f"none; the champion's are left out, at most {1 - MIN_SHARE_LEFT:.0%}",
        "none" if champion is None else _some(champion.seen),
        _some(candidate.seen),
        not candidate.seen and (champion is None or len(champion.seen) <= (1 - MIN_SHARE_LEFT) * candidate.num_split),
    )


def _floors(candidate: Side, champion: Side | None, gates: Gates) -> Iterator[GateRow]:
    floors = [(name, least, "metrics", name) for name, least in gates.floors.items()]
    floors += [(f"{gates.metric} of {name}", least, "per_class", name) for name, least in gates.class_floors.items()]
    for gate, least, part, name in floors:
        old, new = (None if side is None else getattr(side, part).get(name) for side in (champion, candidate))
        yield GateRow(gate, f"at least {least:g}", _shown(old), _shown(new), new is not None and new >= least)


def _budgets(candidate: Side, champion: Side | None, gates: Gates) -> Iterator[GateRow]:
    if gates.max_size_mib is not None:
        old, new = (None if side is None else side.size_bytes / 2**20 for side in (champion, candidate))
        assert new is not None
        yield GateRow(
            "size of weights",
            f"at most {gates.max_size_mib:g} MiB",
            _shown(old, ".1f", " MiB"),
            _shown(new, ".1f", " MiB"),
            new <= gates.max_size_mib,
        )
    if not gates.needs_latency:
        return
    old_ms, new_ms = (None if side is None else side.latency_ms for side in (champion, candidate))
    limits = {"at most {:.4g} ms": gates.max_latency_ms}
    if old_ms is not None and gates.max_latency_ratio is not None:
        limits[f"at most {{:.4g}} ms, {gates.max_latency_ratio:g} times the champion's"] = (
            gates.max_latency_ratio * old_ms
        )
    for text, limit_ms in limits.items():
        if limit_ms is not None:
            yield GateRow(
                "latency, p95",
                text.format(limit_ms),
                _shown(old_ms, ".1f", " ms"),
                _shown(new_ms, ".1f", " ms"),
                new_ms is not None and new_ms <= limit_ms,
            )


def _comparison(candidate: Side, champion: Side, gates: Gates, gain: Gain | None) -> Iterator[GateRow]:
    """Rows that need a champion; the last is the rule's."""
    if candidate.classes != champion.classes:
        yield GateRow(
            "same classes",
            "any" if gates.other_classes else "the champion's, or `other_classes: true` in the dataset's gates",
            ", ".join(champion.classes),
            ", ".join(candidate.classes),
            gates.other_classes,
        )
        return
    for name, most in gates.max_drop.items():
        old, new = champion.metrics.get(name), candidate.metrics.get(name)
        yield GateRow(f"drop of {name}", f"at most {most:g}", _shown(old), _shown(new), _drop(old, new) <= most)
    if gates.max_class_drop is not None and champion.per_class:
        old_of, new_of = champion.per_class, candidate.per_class
        worst = max(old_of, key=lambda name: _drop(old_of[name], new_of.get(name)))
        old, new = old_of[worst], new_of.get(worst)
        yield GateRow(
            f"drop of {gates.metric} of a class",
            f"at most {gates.max_class_drop:g}",
            f"{worst} {_shown(old)}",
            f"{worst} {_shown(new)}",
            _drop(old, new) <= gates.max_class_drop,
        )
    yield _rule(candidate, champion, gates, gain)


def _rule(candidate: Side, champion: Side, gates: Gates, gain: Gain | None) -> GateRow:
    least = -gates.margin if gates.margin is not None else 0.0
    threshold = f"the interval of {gates.confidence:.0%} above {least:g}"
    new = _shown(candidate.metrics.get(gates.metric))
    if gain is None:
        told = f"{new} (too few pictures or sequences to resample)"
    else:
        doubt = ", which cannot tell them apart" if gain.low <= 0 <= gain.high else ""
        told = f"{new} ({gain.shown} on {gain.drawn}{doubt})"
    passed = gain is not None and gain.low > least
    name = "superior" if gates.rule == "superior" else "not inferior"
    return GateRow(f"{name} in {gates.metric}", threshold, _shown(champion.metrics.get(gates.metric)), told, passed)


def _drop(old: float | None, new: float | None) -> float:
    """How much less the candidate has; nothing where neither has any object to find, all where it has no score."""
    if old is None:
        return 0.0
    return math.inf if new is None or not math.isfinite(new) else old - new


def _some(names: tuple[str, ...]) -> str:
    return "none" if not names else f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _shown(value: float | None, form: str = ".4f", unit: str = "") -> str:
    return "none" if value is None else f"{value:{form}}{unit}"

"""One model scored again, by `speck evaluate` or the deployment `evaluate/default`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows.evaluate import dataset_folder, score_run, with_rules
from flows.find_model import find_model
from flows.settings import Settings
from training.artifacts import write_scores
from training.latency import Latency, measure_latency, speed_of
from training.scoring import Scored, Split, score_options, split_inputs

Protocol = Literal["coco", "visdrone", "uavdt", "aitod", "voc"]


class Evaluated(NamedTuple):
    """A model's score. `chosen`: how its thresholds were chosen, where that is not how it is scored here."""

    scored: Scored
    latency: Latency | None
    chosen: str


def evaluate_model(
    model: str,
    settings: Settings,
    split: Split,
    *,
    dataset: str | None = None,
    architecture: str | None = None,
    protocol: Protocol | None = None,
    rules: Mapping[str, Any],
    workers: int = 1,
    latency: bool = True,
    out: Path | None = None,
    say: Callable[[str], object],
) -> Evaluated:
    """Score what `model` means to `find_model`, on the current version of a dataset that is named.

    `out` gets the report. `protocol`: instead of that of the dataset's card. `rules`: see `with_rules`.

    Raises: see `find_model`, `with_rules` and `score_run`.
    """
    with find_model(model, settings, dataset=dataset, architecture=architecture) as found:
        spec = with_rules(found.spec, found.tiling, **rules)
        if protocol is not None:
            card = spec.dataset.card.model_copy(update={"protocol": protocol})
            spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        detector, by_split = score_run(
            spec, found.weights, settings, [split], operating_point=found.operating_point, workers=workers, say=say
        )
        folder, device = dataset_folder(spec, settings), next(detector.parameters()).device
        timed = measure_latency(spec, detector, split_inputs(spec, folder, split), device) if latency else None
    elsewhere = {
        "on the dataset": found.spec.run_key != found.run_key,
        "under the options": score_options(spec) != score_options(found.spec),
    }
    chosen = [how for how, is_so in elsewhere.items() if is_so and found.operating_point is not None]
    # On another dataset the spec has another key, but the weights are still that run's.
    scored = by_split[split]
    scored = scored._replace(result=scored.result.model_copy(update={"run_key": found.run_key}))
    if out is not None:
        write_scores(out, spec, {split: scored}, folder, None if timed is None else speed_of(timed))
    return Evaluated(scored, timed, " and ".join(chosen))

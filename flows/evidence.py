"""What a decision rests on: scores of candidate and champion on the same test pictures, and what both were trained on.

A score is computed here, from the detections that a run kept or from what its weights find now, so that both sides are
counted by the same code and rules.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.card import DatasetCard
from data.contents import pictures_of
from evaluation.protocols import score_by
from evaluation.result import score_key
from evaluation.score import Score, joined, with_counts_named
from evaluation.tables import tabulate
from flows.compare import compare_detections, group_images
from flows.evaluate import dataset_folder, score_run
from flows.find_model import WEIGHTS
from flows.load_gates import protocol_of, require_metrics
from flows.settings import Settings
from tracking.packaging import download_verified
from tracking.promotion import Gain, Gates, Side
from tracking.registry import Version
from tracking.runs import TRAINING
from training.latency import interleaved_p95_ms
from training.records import CorruptResult, RunResult, read_journal, read_result, training_id
from training.scoring import load_model, read_ground_truth, split_inputs
from training.spec import RunSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A model is trained on the one and selected by the other.
TRAINED_ON = ("train", "val")
Detections = list[dict[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """Both sides as `decide` wants them, and what the bootstrap says; `num_left_out` of the test pictures."""

    candidate: Side
    champion: Side | None
    gain: Gain | None
    num_left_out: int


@dataclass(frozen=True)
class _Model:
    """A model on the candidate's test split; `own`: the spec of its training, `spec`: of its scoring."""

    training: str
    own: RunSpec
    spec: RunSpec
    weights: Path
    detections: Detections


def gather(
    client: MlflowClient,
    result: RunResult,
    holder: Version | None,
    gates: Gates,
    settings: Settings,
    faults: tuple[str, ...],
    say: Callable[[str], object],
) -> Evidence:
    """The evidence for and against a finished run; `holder` is the champion's version, `faults` the run's lineage's.

    The champion's own detections count where it was scored on this dataset version, else its weights are scored again.
    Pictures that it was trained or selected on are left out for both.

    Raises:
        BadGates: they name a metric that this dataset does not have.
        DigestMismatch: the champion's files are not those that were registered.
        StoreError: a dataset version of either cannot be had.
        BadGroundTruth, BadDetections, NotComparable: the test split or the detections are damaged.
    """
    card, version = result.spec.dataset.card, result.spec.dataset.version
    truth = read_ground_truth(dataset_folder(result.spec, settings), "test")
    test = pictures_of(version, settings.data_source, ["test"])
    new = _candidate(result, settings)
    candidate = _side(new, settings, test)
    score = result.scores["test"]
    candidate = replace(
        candidate,
        protocol=protocol_of(score.protocol, score.options.max_dets, score.options.ignore_rule),
        num_images=score.counts.get("num_images", 0),
        faults=faults,
        non_finite=_non_finite(new.weights, settings.storage / result.run_key),
    )
    with tempfile.TemporaryDirectory(prefix="speck-champion-") as folder:
        old = None if holder is None else _champion(client, holder, result.spec, gates, settings, Path(folder), say)
        champion = None if old is None else replace(_side(old, settings, test), protocol=gates.protocol)
        left_out = set() if champion is None else set(champion.seen)
        kept = _without(truth, left_out)
        if not kept["images"]:
            kept = truth  # The verdict says that the champion was trained on all of them.
        scored = _score(kept, new.detections, card, gates)
        require_metrics(gates, scored.metrics)
        if not left_out:
            candidate = replace(candidate, faults=(*faults, *_contradicted(result, scored, gates)))
        candidate = _with_score(candidate, scored, gates)
        gain = None
        if old is not None and champion is not None and champion.classes == candidate.classes:
            champion = _with_score(champion, _score(kept, old.detections, card, gates), gates)
            gain = _gain(kept, old.detections, new.detections, card, gates)
        if gates.needs_latency:
            candidate, champion = _timed(new, old, candidate, champion, settings)
    return Evidence(candidate, champion, gain, len(left_out))


def _candidate(result: RunResult, settings: Settings) -> _Model:
    run_folder = settings.storage / result.run_key
    artifacts = run_folder / "artifacts"
    return _Model(training_id(run_folder), result.spec, result.spec, artifacts / WEIGHTS, _kept_detections(artifacts))


def _champion(
    client: MlflowClient,
    holder: Version,
    challenger: RunSpec,
    gates: Gates,
    settings: Settings,
    folder: Path,
    say: Callable[[str], object],
) -> _Model:
    training = holder.tags.get(TRAINING, holder.run_key)
    own = _own_result(settings.storage / holder.run_key, training)
    if own is not None:
        artifacts = settings.storage / holder.run_key / "artifacts"
        trained_by = own.spec
    else:
        artifacts = download_verified(client, challenger.dataset.name, holder.version, folder) / "artifacts"
        trained_by = RunSpec.model_validate_json((artifacts / "spec.json").read_bytes())
    scoring = trained_by.scoring.model_copy(update={"max_dets": gates.max_dets})
    spec = trained_by.model_copy(update={"dataset": challenger.dataset, "scoring": scoring})
    model = _Model(training, trained_by, spec, artifacts / WEIGHTS, [])
    if trained_by.dataset.card.classes != challenger.dataset.card.classes:
        return model
    if own is not None and trained_by.dataset.version == challenger.dataset.version:
        return replace(model, detections=_kept_detections(artifacts))
    say(f"champion v{holder.version} is scored on dataset version {challenger.dataset.version[:12]}")
    _, scored = score_run(spec, model.weights, settings, ("test",), say=say)
    return replace(model, detections=scored["test"].detections)


def _own_result(run_folder: Path, training: str) -> RunResult | None:
    """What the champion's own folder says of it, None if that is damaged, or of another training."""
    if training_id(run_folder) != training:
        return None
    try:
        return read_result(run_folder)
    except CorruptResult:
        return None


def _kept_detections(artifacts: Path) -> Detections:
    found: Detections = json.loads((artifacts / "detections_test.json").read_bytes())
    return found


def _side(model: _Model, settings: Settings, test: dict[str, str]) -> Side:
    """What its own dataset version says of a model; `test`: md5 by name of the pictures that it is judged by."""
    version = model.own.dataset.version
    contents = set(pictures_of(version, settings.data_source, TRAINED_ON).values())
    num_split = len(pictures_of(version, settings.data_source, ["test"]))
    return Side(
        training=model.training,
        dataset_version=version,
        protocol="",
        classes=model.own.dataset.card.classes,
        metrics={},
        per_class={},
        num_images=num_split,
        num_split=num_split,
        size_bytes=model.weights.stat().st_size,
        seen=tuple(sorted(name for name, md5 in test.items() if md5 in contents)),
    )


def _without(truth: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """A split's COCO dict without some pictures."""
    images = [image for image in truth["images"] if image["file_name"] not in names]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in truth["annotations"] if annotation["image_id"] in ids]
    return truth | {"images": images, "annotations": annotations}


def _of(truth: dict[str, Any], detections: Detections) -> Detections:
    ids = {image["id"] for image in truth["images"]}
    return [detection for detection in detections if detection["image_id"] in ids]


def _score(truth: dict[str, Any], detections: Detections, card: DatasetCard, gates: Gates) -> Score:
    tables = tabulate(truth, _of(truth, detections))
    coco = score_by("coco", tables, max_dets=gates.max_dets, ignore_rule=card.ignore_rule)
    if card.protocol == "coco":
        return coco
    own = score_by(card.protocol, tables, ignore_rule=card.ignore_rule)
    return joined(coco, with_counts_named(own, card.protocol))


def _with_score(side: Side, score: Score, gates: Gates) -> Side:
    per_class = {name: values.get(gates.metric) for name, values in score.per_class.items()}
    return replace(side, metrics=score.metrics, per_class=per_class)


def _contradicted(result: RunResult, score: Score, gates: Gates) -> tuple[str, ...]:
    """Whether the score that was recorded is that of the detections that were kept, where the same code counts."""
    recorded = result.scores["test"]
    rules = protocol_of(recorded.protocol, recorded.options.max_dets, recorded.options.ignore_rule)
    if rules != gates.protocol or recorded.score_key != score_key(recorded.protocol, recorded.options):
        return ()
    told, found = recorded.metrics.get(gates.metric), score.metrics[gates.metric]
    if told == found or (told is not None and found is not None and math.isclose(told, found, abs_tol=1e-9)):
        return ()
    return (f"{gates.metric} was recorded as {told}, and its detections have {found}",)


def _gain(truth: dict[str, Any], old: Detections, new: Detections, card: DatasetCard, gates: Gates) -> Gain | None:
    names = [image["file_name"] for image in truth["images"]]
    if len(set(group_images(names, card).groups)) < 2:
        return None
    comparison, grouping = compare_detections(
        truth, (_of(truth, old), _of(truth, new)), card, max_dets=gates.max_dets, confidence=gates.confidence
    )
    found = comparison.metrics.get(gates.metric)
    if found is None or found.difference is None or found.low is None or found.high is None:
        return None
    drawn = f"{comparison.num_groups} {grouping.kind}"
    return Gain(found.difference, found.low, found.high, gates.confidence, drawn)


def _non_finite(weights: Path, run_folder: Path) -> tuple[str, ...]:
    """Weights that are not finite, and what was not in the last epoch's report."""
    from safetensors import safe_open

    found = []
    with safe_open(weights, framework="pt") as given:
        for name in given.keys():  # noqa: SIM118
            if not torch.isfinite(given.get_tensor(name)).all():
                found.append(f"weights {name}")
    reported = [name for entry in read_journal(run_folder)[-1:] for name in entry.non_finite]
    return (*(found[:3] if len(found) < 4 else [*found[:3], f"{len(found) - 3} more"]), *reported)


def _timed(
    new: _Model, old: _Model | None, candidate: Side, champion: Side | None, settings: Settings
) -> tuple[Side, Side | None]:
    """Both sides with their latency; a champion of other classes is not timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [new] if old is None or old.own.dataset.card.classes != new.own.dataset.card.classes else [new, old]
    folder = dataset_folder(new.spec, settings)
    sides = [
        (model.spec, load_model(model.spec, model.weights).to(device), split_inputs(model.spec, folder, "test"))
        for model in models
    ]
    times = interleaved_p95_ms(sides, device)
    candidate = replace(candidate, latency_ms=times[0])
    return candidate, replace(champion, latency_ms=times[1]) if champion is not None and len(times) > 1 else champion

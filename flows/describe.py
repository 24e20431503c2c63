"""What people must know of a finished run before they use its model: the facts of its model card."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from data.objects import StoreError
from evaluation.analysis_records import Analysis
from evaluation.result import ScoreOptions
from evaluation.samples import samples_by
from evaluation.significance import NotComparable, intervals
from evaluation.tables import tabulate
from flows.compare import group_images
from flows.evaluate import dataset_folder
from flows.settings import Settings
from tracking.model_card import Measured, ModelCard
from training.artifacts import read_operating_point
from training.records import RunResult, read_attempt
from training.scoring import read_ground_truth
from training.spec import RunSpec

NUM_SAMPLES = 1000


def describe(result: RunResult, training: str, settings: Settings) -> ModelCard:
    """The card of a run's model, from its result and its artifacts.

    Where an artifact or the dataset version is out of reach the card says less, and says so.
    """
    spec, test = result.spec, result.scores["test"]
    card, folder = spec.dataset.card, settings.storage / result.run_key
    analysis = _analysis(folder / "artifacts" / "analysis_test.json")
    point = None if analysis is None else analysis.operating_point.overall
    chosen = read_operating_point(folder / "artifacts")
    bounds, interval = _intervals(result, settings)
    names = [name for name in test.metrics if not name.startswith("analysis/")]
    return ModelCard(
        name=spec.dataset.name,
        dataset=card.description,
        licence=card.licence,
        sources="; ".join(card.sources) or card.source,
        data_version=spec.dataset.version,
        num_images={split: n for split in result.scores if (n := result.scores[split].counts.get("num_images"))},
        classes=card.classes,
        architecture=spec.architecture.label,
        input=_input(test.options),
        recipe=_recipe(spec),
        protocol=" and ".join(dict.fromkeys(("coco", test.protocol))),
        rules=_rules(test.options),
        scores={name: Measured(test.metrics[name], *bounds.get(name, ())) for name in names},
        interval=interval,
        ap_by_class={name: values.get("coco/AP") for name, values in test.per_class.items()},
        ap_by_size={} if analysis is None else analysis.ap_by_size,
        recall_by_size=_recall(analysis),
        errors=_errors(analysis),
        threshold=None if chosen is None or chosen.overall is None else chosen.overall.score,
        precision=None if point is None else point.precision,
        recall=None if point is None else point.recall,
        latency="",
        provenance={
            "run key": result.run_key,
            "training": training,
            "commit": _commit(folder, result.attempts),
            "code": result.code_hash,
            "weights, sha256": result.files.get("artifacts/weights.safetensors", "unknown"),
        },
    )


def _analysis(path: Path) -> Analysis | None:
    return TypeAdapter(Analysis).validate_json(path.read_bytes()) if path.is_file() else None


def _intervals(result: RunResult, settings: Settings) -> tuple[dict[str, tuple[float, float]], str]:
    """Bounds by metric, and a sentence on how they came about."""
    test, card = result.scores["test"], result.spec.dataset.card
    detections = settings.storage / result.run_key / "artifacts" / "detections_test.json"
    if not detections.is_file():
        return {}, "No interval: the run's detections were not kept."
    try:
        truth = read_ground_truth(dataset_folder(result.spec, settings), "test")
        tables = tabulate(truth, json.loads(detections.read_bytes()))
        grouping = group_images(tables.file_names, card)
        options = test.options
        sample = partial(samples_by, card.protocol, max_dets=options.max_dets, ignore_rule=options.ignore_rule)
        bounds = intervals(tables, sample, groups=np.array(grouping.groups, np.int64), num_samples=NUM_SAMPLES)
    except (StoreError, NotComparable) as error:
        return {}, f"No interval: {error}."
    drawn = f"{len(set(grouping.groups))} {grouping.kind}"
    return bounds, f"Intervals: {NUM_SAMPLES} bootstrap samples of the split's {drawn}; another seed is not in them."


def _input(options: ScoreOptions) -> str:
    if (tiling := options.tiling) is None:
        seen = "the whole picture"
    else:
        seen = f"tiles of {tiling.size_px} px that share {tiling.overlap_px} px, whose detections are merged,"
    mirrored = ", and its mirror image" if options.flip else ""
    return (
        f"a JPEG or PNG, as stored (EXIF orientation is not applied); {seen} letterboxed to "
        f"{options.input_size_px} px{mirrored}. Detections come back in the picture's own pixels."
    )


def _rules(options: ScoreOptions) -> str:
    return (
        f"score >= {options.score_threshold:g}, NMS IoU {options.nms_iou:g}, at most {options.max_detections} "
        f"detections a picture, maxDets {options.max_dets}, ignore rule {options.ignore_rule}, {options.precision}"
    )


def _recipe(spec: RunSpec) -> str:
    recipe = spec.training
    started = "from weights " + recipe.warm_start[:19] if recipe.warm_start else "from scratch"
    frozen = f"; kept frozen: {', '.join(recipe.freeze)}" if recipe.freeze else ""
    settings = ", ".join(f"{name} {value}" for name, value in spec.architecture.settings.items())
    return (
        f"{recipe.epochs} epochs of {recipe.optimizer}, {started}{frozen}; batches of {recipe.batch_size} pictures at "
        f"{recipe.input_size_px} px, learning rate {recipe.learning_rate:g}, {recipe.precision}, seed {spec.seed}. "
        f"Settings of the architecture: {settings or 'defaults'}. All of it is in `artifacts/spec.json`."
    )


def _recall(analysis: Analysis | None) -> dict[str, tuple[int, int]]:
    rows = [] if analysis is None else analysis.recall_by_size
    return {row.size: (row.num_objects, row.num_found_at_threshold) for row in rows}


def _errors(analysis: Analysis | None) -> dict[str, tuple[float, int]]:
    """Of the types; the sums of all false positives and all false negatives are none."""
    if analysis is None:
        return {}
    counts, lost = analysis.error_types.counts, analysis.error_types.lost_ap50
    return {name: (lost[name], counts[name]) for name in counts if name in lost}


def _commit(run_folder: Path, attempt: int) -> str:
    try:
        return read_attempt(run_folder, attempt).provenance.get("mlflow.source.git.commit", "unknown")
    except FileNotFoundError:
        return "unknown"

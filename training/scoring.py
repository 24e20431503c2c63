"""Scoring a model on one split with all workers, and the files a finished run leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from torch import nn
from torch.utils.data import DataLoader, Subset

from data.batch import collate
from data.loader import DetectionDataset
from data.tiled_pictures import TiledPictures
from data.tiling import TileGrid
from evaluation.coco import score
from evaluation.detector import Detected, detect
from evaluation.pictures import pr_plot, predictions_page, training_curves
from evaluation.result import ScoreOptions, ScoreResult, coco_result
from evaluation.score import Score
from evaluation.tiles import merge_tiles
from models.interface import Detector, PostprocessConfig
from training.checkpoint import save_tensors, write_json
from training.records import read_journal
from training.spec import RunSpec
from training.workers import Workers

Split = Literal["val", "test"]
# Pictures show what a user would act on; scores count everything above ScoringSpec.score_threshold.
SHOWN_SCORE = 0.3
# Images per worker and forward pass. Fixed: in bf16 another batch size rounds otherwise.
SCORING_BATCH = 8


class Scored(NamedTuple):
    """A split's score with what it was computed from: ground truth and detections in COCO form."""

    result: ScoreResult
    curves: Score
    ground_truth: dict[str, Any]
    detections: list[dict[str, Any]]


def score_split(
    spec: RunSpec,
    model: nn.Module,
    dataset_folder: Path,
    split: Split,
    workers: Workers,
    cache_folder: Path | None = None,
) -> Scored | None:
    """Score `model` on `split`; every rank detects its share of the images. The result is on rank 0, None elsewhere.

    Decoded pictures are kept in `cache_folder`, when given, for the next time.

    Raises:
        UndecodableImage: an image is damaged; a score over the others would be another score.
        RuntimeError: an image was seen twice or not at all.
    """
    scoring = spec.scoring
    options = score_options(spec)
    dataset: DetectionDataset | TiledPictures
    if options.tiling is None:
        dataset = DetectionDataset(
            dataset_folder,
            split,
            input_size_px=options.input_size_px,
            augment=None,
            seed=0,
            cache_bytes=0,
            cache_folder=cache_folder,
        )
    else:
        dataset = TiledPictures(dataset_folder, split, options.tiling, input_size_px=options.input_size_px)
    share = range(workers.rank, len(dataset), workers.world_size)
    if isinstance(dataset, TiledPictures):
        # Tiles of one picture together: then it is decoded once, by one worker.
        ends = [len(dataset) * rank // workers.world_size for rank in (workers.rank, workers.rank + 1)]
        share = range(*ends)
    loader: DataLoader[Any] = DataLoader(Subset(dataset, share), batch_size=SCORING_BATCH, collate_fn=collate)
    postprocess = PostprocessConfig(
        score_threshold=scoring.score_threshold,
        nms_iou=scoring.nms_iou,
        max_detections=scoring.max_detections,
        max_candidates=scoring.max_candidates,
    )
    detected = detect(
        cast(Detector, model), loader, postprocess, device=workers.device, bf16=spec.training.precision == "bf16"
    )
    gathered = workers.gather(detected)
    if gathered is None:
        return None
    ground_truth = json.loads((dataset_folder / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    counts = {name: sum(part.counts[name] for part in gathered) for name in gathered[0].counts}
    if counts["num_detected_images"] != len(dataset):
        raise RuntimeError(
            f"{split}: detected on {counts['num_detected_images']} images or tiles of {len(dataset)}; "
            "every one must count exactly once"
        )
    found = [detection for part in gathered for detection in part.detections]
    if isinstance(dataset, TiledPictures):
        found, counts = merge_tiles(Detected(found, counts), dataset.tiles, max_detections=scoring.max_detections)
    detections = sorted(found, key=lambda detection: (detection["image_id"], -detection["score"]))
    curves = score(ground_truth, detections, max_dets=scoring.max_dets, ignore_rule=options.ignore_rule)
    result = coco_result(
        curves,
        run_key=spec.run_key,
        dataset_name=spec.dataset.name,
        dataset_version=spec.dataset.version,
        split=split,
        options=options,
        detection_counts=counts,
    )
    return Scored(result, curves, ground_truth, detections)


def score_options(spec: RunSpec) -> ScoreOptions:
    """How a run with this spec is scored; with the protocol and the evaluation code, what its score key is made of."""
    card, scoring = spec.dataset.card, spec.scoring
    tiling = scoring.tiling or card.tiling
    return ScoreOptions(
        input_size_px=spec.training.input_size_px,
        precision=spec.training.precision,  # type: ignore[arg-type]
        ignore_rule=card.ignore_rule,
        tiling=None if tiling is None else TileGrid(size_px=tiling.size_px, overlap_px=tiling.overlap_px),
        **scoring.model_dump(exclude={"tiling"}),
    )


def write_artifacts(
    spec: RunSpec,
    weights: dict[str, Any],
    scored: dict[Split, Scored],
    seconds: dict[str, float],
    dataset_folder: Path,
    run_folder: Path,
) -> None:
    """Weights, scores, detections and pictures into `<run>/artifacts/`, all of them or none."""
    partial = run_folder / "artifacts.partial"
    # What a killed worker left.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tensors(partial / "weights.safetensors", weights)
        write_json(partial / "spec.json", spec.model_dump(mode="json"))
        write_json(partial / "seconds.json", seconds)
        for split, content in scored.items():
            write_json(partial / f"score_{split}.json", content.result.model_dump(mode="json"))
            (partial / f"detections_{split}.json").write_text(json.dumps(content.detections), encoding="utf-8")
        test = scored["test"]
        pr_plot(test.curves.precision_at_50, partial / "pr_curve_test.png")
        predictions_page(
            dataset_folder / "images",
            test.ground_truth,
            test.detections,
            partial / "predictions_test.jpg",
            ignore_rule=spec.dataset.card.ignore_rule,
            score_threshold=SHOWN_SCORE,
        )
        training_curves(
            [{"epoch": entry.epoch, **entry.metrics} for entry in read_journal(run_folder)],
            partial / "training_curves.png",
        )
        artifacts = run_folder / "artifacts"
        shutil.rmtree(artifacts, ignore_errors=True)
        partial.rename(artifacts)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

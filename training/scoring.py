"""Scoring a model on one split with all workers: detections, their score and what is behind it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils.data import DataLoader

from data.batch import Batch, collate
from data.loader import DetectionDataset
from data.sampler import scoring_batches
from data.tiled_pictures import TiledPictures
from data.tiling import TileGrid
from evaluation.analysis import analyse, headline
from evaluation.analysis_records import Analysis, OperatingPoint
from evaluation.coco import score
from evaluation.detector import Detected, detect
from evaluation.foreground import ForegroundObserver, ForegroundReport, foreground_of_matches
from evaluation.protocols import score_by
from evaluation.result import ScoreOptions, ScoreResult, score_result
from evaluation.score import joined, with_counts_named
from evaluation.tables import tabulate
from evaluation.tiles import merge_tiles
from models.interface import Detector, PostprocessConfig
from training.errors import MiscountedImages
from training.spec import RunSpec
from training.state import UnfitWeights, build_model
from training.workers import Workers

Split = Literal["train", "val", "test"]
# Images of a forward pass. Fixed: another batch size may round otherwise, in bf16 above all.
SCORING_BATCH = 8
# Of a scoring job: what its folder holds, and what starts a worker's word of how many inputs it has done.
ORDER, DETECTED = "order.json", "detected.json"
SHARE_MARK = "done by worker"


class Scored(NamedTuple):
    """A split's score with what it was computed from, ground truth and detections in COCO form, and what is behind it.

    `precision_at_50`: see `evaluation.score.Score`.
    """

    result: ScoreResult
    precision_at_50: Mapping[str, NDArray[np.float64]]
    ground_truth: dict[str, Any]
    detections: list[dict[str, Any]]
    analysis: Analysis
    foreground: ForegroundReport


class ScoringOrder(BaseModel):
    """What the workers of a scoring job are asked to do. `data_source`: where nodes fetch the dataset version from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: RunSpec
    split: Split
    data_source: str


def read_order(folder: Path) -> ScoringOrder:
    """The order in a scoring job's folder."""
    return ScoringOrder.model_validate_json((folder / ORDER).read_bytes())


def score_split(
    spec: RunSpec,
    model: nn.Module,
    dataset_folder: Path,
    split: Split,
    workers: Workers,
    cache_folder: Path | None = None,
    *,
    operating_point: OperatingPoint | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Scored | None:
    """Score `model` on `split`; every rank detects its share of the images. The result is on rank 0, None elsewhere.

    Decoded pictures are kept in `cache_folder`, when given, for the next time. `operating_point`: as in `analyse`.
    `alive` is called after each batch.

    Raises: see `detect_split`.
    """
    ground_truth = read_ground_truth(dataset_folder, split)
    inputs = split_inputs(spec, dataset_folder, split, cache_folder)
    detected = detect_split(spec, model, inputs, workers, lambda _: alive(), ground_truth=ground_truth)
    return None if detected is None else score_detections(spec, ground_truth, split, detected, operating_point)


def validate(
    spec: RunSpec,
    model: nn.Module,
    dataset_folder: Path,
    workers: Workers,
    cache_folder: Path | None = None,
    *,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """COCO's metrics on the val split on rank 0, nothing elsewhere: as `score_split` gives them, many times as fast.

    Raises: see `detect_split`.
    """
    inputs = split_inputs(spec, dataset_folder, "val", cache_folder)
    detected = detect_split(spec, model, inputs, workers, lambda _: alive())
    if detected is None:
        return {}
    options = score_options(spec)
    return score(
        read_ground_truth(dataset_folder, "val"),
        detected.detections,
        max_dets=options.max_dets,
        ignore_rule=options.ignore_rule,
        by_pycocotools=False,
    ).metrics


def read_ground_truth(dataset_folder: Path, split: Split) -> dict[str, Any]:
    """A prepared split's COCO dict."""
    content: dict[str, Any] = json.loads((dataset_folder / "annotations" / f"{split}.json").read_bytes())
    return content


def split_inputs(
    spec: RunSpec, dataset_folder: Path, split: Split, cache_folder: Path | None = None
) -> DetectionDataset | TiledPictures:
    """What the network is shown of a split, in the split's order: letterboxed pictures, or their tiles.

    Raises:
        FileNotFoundError: the dataset has no such split.
    """
    options = score_options(spec)
    if options.tiling is not None:
        return TiledPictures(dataset_folder, split, options.tiling, input_size_px=options.input_size_px)
    return DetectionDataset(
        dataset_folder,
        split,
        input_size_px=options.input_size_px,
        augment=None,
        seed=0,
        cache_bytes=0,
        cache_folder=cache_folder,
    )


def detect_split(
    spec: RunSpec,
    model: nn.Module,
    inputs: DetectionDataset | TiledPictures,
    workers: Workers,
    progress: Callable[[int], None] = lambda _: None,
    *,
    ground_truth: Mapping[str, Any] | None = None,
) -> Detected | None:
    """Detections in pixels of the pictures, by picture and descending score, on rank 0; None elsewhere.

    The same for any number of workers, to the last bit: see `scoring_batches`. `progress` is told how many inputs of
    this rank are done, after each batch. With `ground_truth` the result tells of its objects' scores, see
    `ForegroundObserver`.

    Raises:
        UndecodableImage: an image is damaged; a score over the others would be another score.
        MiscountedImages: an image or tile was detected on twice, or not at all.
    """
    batches = scoring_batches(len(inputs), batch_size=SCORING_BATCH, rank=workers.rank, world_size=workers.world_size)
    loader: DataLoader[Any] = DataLoader(inputs, batch_sampler=batches, collate_fn=collate)
    seen: list[int] = []
    tiles = inputs.tiles if isinstance(inputs, TiledPictures) else None
    detector = cast(Detector, model)
    detected = detect(
        detector,
        _followed(loader, seen, progress),
        postprocess_config(spec),
        device=workers.device,
        bf16=spec.training.precision == "bf16",
        flip=spec.scoring.flip,
        observer=None if ground_truth is None else ForegroundObserver(detector, ground_truth, tiles),
    )
    gathered = workers.gather((detected, seen))
    if gathered is None:
        return None
    numbers = [number for _, part in gathered for number in part]
    counts = {name: sum(part.counts[name] for part, _ in gathered) for name in detected.counts}
    found = Detected(
        [detection for part, _ in gathered for detection in part.detections],
        counts,
        [row for part, _ in gathered for row in part.object_scores],
    )
    if isinstance(inputs, TiledPictures):
        require_each_once("tile", range(len(inputs)), numbers)
        return merge_tiles(found, inputs.tiles, max_detections=spec.scoring.max_detections)
    require_each_once("image", inputs.image_ids, numbers)
    return found


def _followed(loader: Iterable[Batch], seen: list[int], progress: Callable[[int], None]) -> Iterator[Batch]:
    """The batches, whose images or tiles join `seen` once the next batch is asked for: then they were detected on."""
    for batch in loader:
        yield batch
        seen += batch.image_ids
        progress(len(seen))


def require_each_once(what: str, expected: Iterable[int], seen: Iterable[int]) -> None:
    """Raise MiscountedImages unless `seen` holds every id of `expected` once; `what`: of images or of tiles."""
    times = Counter(seen)
    faults = {
        "not at all": [number for number in expected if number not in times],
        "more than once": sorted(number for number, count in times.items() if count > 1),
    }
    if told := [f"{how}: {len(ids)} (id {_some(ids)})" for how, ids in faults.items() if ids]:
        raise MiscountedImages(
            f"each {what} of the split must be detected on exactly once. {'; '.join(told)}. Score again; if that does "
            "not help, prepare the dataset again"
        )


def _some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


def score_detections(
    spec: RunSpec,
    ground_truth: dict[str, Any],
    split: Split,
    detected: Detected,
    operating_point: OperatingPoint | None = None,
) -> Scored:
    """The score of a split's detections under the spec's rules: by COCO's protocol, and by the dataset's own.

    `operating_point` was chosen on val; without it this split chooses one.
    """
    options, protocol = score_options(spec), spec.dataset.card.protocol
    detections: list[Any] = sorted(
        detected.detections, key=lambda detection: (detection["image_id"], -detection["score"])
    )
    tables = tabulate(ground_truth, detections)
    coco = score_by("coco", tables, max_dets=options.max_dets, ignore_rule=options.ignore_rule)
    analysis = analyse(
        tables,
        ignore_rule=options.ignore_rule,
        max_dets=options.max_dets,
        operating_point=operating_point,
        chosen_on=split if operating_point is None else "val",
    )
    scores = [coco, headline(analysis)]
    if protocol != "coco":
        own = score_by(protocol, tables, ignore_rule=options.ignore_rule)
        scores.insert(1, with_counts_named(own, protocol))
    result = score_result(
        joined(*scores),
        protocol=protocol,
        run_key=spec.run_key,
        dataset_name=spec.dataset.name,
        dataset_version=spec.dataset.version,
        split=split,
        options=options,
        detection_counts=detected.counts,
    )
    foreground = foreground_of_matches(
        detected.object_scores,
        ground_truth,
        detections,
        ignore_rule=options.ignore_rule,
        score_threshold=analysis.operating_point.shown_score,
    )
    return Scored(result, coco.precision_at_50, ground_truth, detections, analysis, foreground)


def postprocess_config(spec: RunSpec) -> PostprocessConfig:
    """How raw predictions become detections when a run with this spec is scored."""
    scoring = spec.scoring
    return PostprocessConfig(
        score_threshold=scoring.score_threshold,
        nms_iou=scoring.nms_iou,
        max_detections=scoring.max_detections,
        max_candidates=scoring.max_candidates,
    )


def load_model(spec: RunSpec, weights: Path) -> nn.Module:
    """The spec's detector with the weights in a safetensors file.

    Raises:
        UnfitWeights: it is no such file or damaged, or its tensors are not those of the architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(weights)
    except SafetensorError as error:
        raise UnfitWeights(f"{weights} is no safetensors file, or is damaged: {error}. Give a whole one") from None
    model = build_model(spec)
    wanted = model.state_dict()
    shapes, wanted_shapes = ({name: value.shape for name, value in one.items()} for one in (given, wanted))
    if differing := sorted(name for name in shapes | wanted_shapes if shapes.get(name) != wanted_shapes.get(name)):
        raise UnfitWeights(
            f"{weights}: {len(differing)} of its tensors, or of those that {spec.architecture.label} has for "
            f"{len(spec.dataset.card.classes)} classes, have no counterpart of the same shape, {differing[0]} first. "
            "Give the architecture, settings and dataset that the weights were trained with"
        )
    model.load_state_dict(given)
    return model


def score_options(spec: RunSpec) -> ScoreOptions:
    """How a run with this spec is scored; with the protocol and the evaluation code, what its score key is made of."""
    card, scoring = spec.dataset.card, spec.scoring
    tiling = scoring.tiling or card.tiling
    return ScoreOptions(
        input_size_px=scoring.input_size_px or spec.training.input_size_px,
        precision=spec.training.precision,  # type: ignore[arg-type]
        ignore_rule=card.ignore_rule,
        tiling=None if tiling is None else TileGrid(size_px=tiling.size_px, overlap_px=tiling.overlap_px),
        **scoring.model_dump(exclude={"tiling", "input_size_px"}),
    )

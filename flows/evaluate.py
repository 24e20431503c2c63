"""Score weights without training: on any split, under any rules, on any version of a dataset, with any workers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from data.store import on_this_node
from data.tiling import TileGrid
from evaluation.analysis_records import OperatingPoint
from evaluation.detector import Detected
from evaluation.foreground import ObjectScore
from flows.experiment import readable_errors
from flows.settings import REPO, Settings
from training.artifacts import write_artifacts
from training.checkpoint import write_json
from training.cluster import Cluster, embedded_cluster
from training.jobs import Jobs, code_snapshot
from training.records import RunResult, hash_files, read_journal, read_result, write_result
from training.say import PROGRESS_MARK
from training.scoring import (
    DETECTED,
    ORDER,
    SHARE_MARK,
    Scored,
    ScoringOrder,
    Split,
    detect_split,
    load_model,
    read_ground_truth,
    score_detections,
    score_options,
    split_inputs,
)
from training.spec import RunSpec, ScoringSpec
from training.workers import Workers

NEWS_EVERY_S = 5.0
# Begins the name of a scoring job's folder in storage.
SCRATCH = "scoring-"


class UnknownRun(LookupError):
    """No finished run has this key."""


class BadScoring(ValueError):
    """Rules of scoring that are impossible, or contradict each other."""


def find_result(run_key: str, settings: Settings) -> RunResult:
    """The finished run whose key starts with `run_key`.

    Raises:
        UnknownRun: none or several do.
    """
    finished = sorted(path.parent.name for path in settings.storage.glob("*/result.json"))
    matching = [name for name in finished if name.startswith(run_key)]
    if len(matching) != 1:
        found = "several do" if matching else "none does"
        raise UnknownRun(
            f"{run_key!r} must begin the key of exactly one finished run; {found}. Finished: "
            f"{', '.join(finished) or 'none; train one with `speck train`'}"
        )
    result = read_result(settings.storage / matching[0])
    assert result is not None
    return result


def with_rules(
    spec: RunSpec,
    usual_tiling: TileGrid | None,
    *,
    input_size_px: int | None = None,
    tiled: bool | None = None,
    tile_size_px: int | None = None,
    tile_overlap_px: int | None = None,
    flip: bool | None = None,
    max_dets: int | None = None,
) -> RunSpec:
    """The spec scored by other rules; None leaves one as it is, and of tiles as in `usual_tiling`.

    `tiled` without a size means the usual tiles, else those of the dataset's card, else tiles of the input size. The
    overlap is that of these tiles, or a fifth of a size that was given.

    Raises:
        BadScoring: a value is impossible, or tiles were described and not wanted.
    """
    described = tile_size_px is not None or tile_overlap_px is not None
    if tiled is False and described:
        raise BadScoring("--whole looks at whole pictures: leave out --tile-size and --tile-overlap, or use --tiled")
    changes: dict[str, Any] = {"input_size_px": input_size_px, "flip": flip, "max_dets": max_dets}
    changes = {name: value for name, value in changes.items() if value is not None} | {"tiling": None}
    card = spec.dataset.card
    if tiled or described or (tiled is None and usual_tiling is not None):
        grid = usual_tiling or card.tiling
        if grid is None or tile_size_px is not None:
            side_px = tile_size_px if tile_size_px is not None else input_size_px or score_options(spec).input_size_px
            changes["tiling"] = {"size_px": side_px, "overlap_px": side_px // 5}
        else:
            changes["tiling"] = {"size_px": grid.size_px, "overlap_px": grid.overlap_px}
        if tile_overlap_px is not None:
            changes["tiling"]["overlap_px"] = tile_overlap_px
    else:
        card = card.model_copy(update={"tiling": None})
    try:
        scoring = ScoringSpec.model_validate(spec.scoring.model_dump() | changes)
    except ValidationError as error:
        raise BadScoring("rules of scoring:\n" + "\n".join(readable_errors(error, ScoringSpec))) from None
    dataset = spec.dataset.model_copy(update={"card": card})
    return spec.model_copy(update={"scoring": scoring, "dataset": dataset})


def score_run(
    spec: RunSpec,
    weights: Path,
    settings: Settings,
    splits: Sequence[Split],
    *,
    operating_point: OperatingPoint | None = None,
    workers: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[nn.Module, dict[Split, Scored]]:
    """Score weights on the spec's dataset version under its scoring rules; the model is on this process's device.

    Without an `operating_point` the first split chooses one. One worker is this process; more are a Ray job, which
    gives the same score. `say` is told of the progress.

    Raises:
        UnfitWeights, UndecodableImage, MiscountedImages: see `load_model` and `detect_split`.
        CellFailed: the job of several workers failed.
    """
    folder = dataset_folder(spec, settings)
    alone = Workers.current(on_gpu=torch.cuda.is_available())
    model = load_model(spec, weights).to(alone.device)
    scored: dict[Split, Scored] = {}
    for split in splits:
        inputs, ground_truth = split_inputs(spec, folder, split), read_ground_truth(folder, split)
        pace = _Pace(len(inputs), score_options(spec).tiling is not None, say)
        if workers == 1:
            detected = detect_split(spec, model, inputs, alone, pace.tell, ground_truth=ground_truth)
            assert detected is not None  # a group of one has rank 0
        else:
            detected = _detect_together(spec, weights, settings, split, workers, pace)
        scored[split] = score_detections(spec, ground_truth, split, detected, operating_point)
        operating_point = operating_point or scored[split].analysis.operating_point
    return model, scored


def _detect_together(
    spec: RunSpec, weights: Path, settings: Settings, split: Split, num_workers: int, pace: _Pace
) -> Detected:
    """What a Ray job of several workers detects on a split, on the running cluster or an embedded one."""
    compute = spec.compute.model_copy(update={"workers": num_workers})
    if settings.ray_jobs_url is None and not torch.cuda.is_available():
        # The machine that trained the model may have had GPUs.
        compute = compute.model_copy(update={"gpus_per_worker": 0})
    order = ScoringOrder(
        spec=spec.model_copy(update={"compute": compute}), split=split, data_source=settings.data_source
    )
    folder = settings.storage / f"{SCRATCH}{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    num_done: dict[str, int] = {}

    def on_line(line: str) -> None:
        _, marked, told = line.partition(f"{PROGRESS_MARK} {SHARE_MARK} ")
        if marked:
            rank, _, done = told.strip().partition(" ")
            num_done[rank] = int(done)
            pace.tell(sum(num_done.values()))
            # So that nobody takes the folder for forgotten.
            os.utime(folder)

    pace.say(f"starting a Ray job of {num_workers} workers")
    try:
        shutil.copyfile(weights, folder / "weights.safetensors")
        write_json(folder / ORDER, order.model_dump(mode="json"))
        with ExitStack() as stack:
            url = settings.ray_jobs_url
            remote = None if url is None else Cluster(settings.ray_address, url)
            jobs = Jobs(remote or stack.enter_context(embedded_cluster(settings.home)))
            with code_snapshot(REPO) as code:
                submission_id = jobs.start(f"{folder.name}-1", ("training.scoring_job", str(folder)), order.spec, code)
            try:
                # Elsewhere the job has to end before its folder goes; one's own cluster ends with this block.
                finished = (folder / DETECTED).is_file
                jobs.follow(submission_id, on_line, finished if jobs.embedded else lambda: False)
            except BaseException:
                with suppress(OSError, RuntimeError):
                    jobs.stop(submission_id)
                raise
            pace.tell(pace.total)
        content = json.loads((folder / DETECTED).read_bytes())
        return Detected(**content | {"object_scores": [ObjectScore(*row) for row in content["object_scores"]]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Pace:
    """Tells every few seconds how far scoring is, how fast it is and how long it will take."""

    def __init__(self, total: int, tiled: bool, say: Callable[[str], object]) -> None:
        self.total, self.what, self.say = total, "tiles" if tiled else "images", say
        self.started = self.told = time.monotonic()

    def tell(self, num_done: int) -> None:
        """Say so, unless it was said a moment ago; the end always. As long as nothing is done the clock stands."""
        now = time.monotonic()
        if num_done == 0:
            self.started = self.told = now
        if num_done == 0 or (now - self.told < NEWS_EVERY_S and num_done < self.total):
            return
        self.told = now
        per_s = num_done / max(now - self.started, 1e-9)
        minutes, seconds = divmod(round((self.total - num_done) / per_s), 60)
        self.say(f"{num_done}/{self.total} {self.what}, {per_s:.1f} {self.what}/s, ETA {minutes}:{seconds:02d}")


def score_again(result: RunResult, spec: RunSpec, settings: Settings) -> RunResult:
    """Score a finished run under the scoring rules of `spec`, and put the new scores in the place of the old."""
    run_folder = settings.storage / result.run_key
    started = time.monotonic()
    model, scored = score_run(spec, run_folder / "artifacts" / "weights.safetensors", settings, ("val", "test"))
    seconds = {**result.seconds, "score_again": time.monotonic() - started}
    write_artifacts(
        spec,
        model.state_dict(),
        scored,
        seconds,
        dataset_folder(spec, settings),
        run_folder / "artifacts",
        read_journal(run_folder),
    )
    new = result.model_copy(
        update={
            "spec": spec,
            "scores": {split: found.result for split, found in scored.items()},
            "files": hash_files(run_folder, run_folder / "artifacts"),
            "seconds": seconds,
        }
    )
    write_result(run_folder, new)
    return new


def dataset_folder(spec: RunSpec, settings: Settings) -> Path:
    """This node's copy of the spec's dataset version."""
    return on_this_node(spec.dataset.name, spec.dataset.version, settings.data_source)

"""What there is to do for each cell, why, and how long and how much disk it will probably take."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import models
from data.store import default_root
from data.summary import summarise
from evaluation.result import score_key
from flows.mirror import Mirror
from flows.settings import REPO, Settings
from training.checkpoint import (
    CorruptCheckpoint,
    newest_first,
    read_manifest,
    verify_checkpoint,
    write_json,
)
from training.code import training_code_hash
from training.probe import Probe, probe
from training.records import CorruptResult, JournalEntry, RunResult, latest_code_hash, read_journal, read_result
from training.scoring import score_options
from training.spec import ComputeSpec, RunSpec
from training.state import fit, warm_start_path

OnCodeChange = Literal["warn", "retrain"]
State = Literal["cached", "stale", "score", "resume", "train"]
# Of a cell beside training and scoring where none ran yet: starting the Ray job and its workers, and ending it.
OVERHEAD_S = 25.0
# Of that, what a run does not know of itself: submitting its job, and noticing the end.
OUTSIDE_JOB_S = 8.0
# In the node's store. What was measured on a busy machine must not be believed for ever.
PROBES = ".probes"
PROBE_HOLDS_S = 86_400.0
# Pictures, detections and curves beside the weights.
PICTURES_BYTES = 5 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes that a cell will probably take from now on, and what that is taken from."""

    seconds: float
    disk_bytes: int
    source: str


@dataclass(frozen=True)
class PlannedCell:
    """A cell with what will happen to it, and why; `superseding` when a finished training is to be put aside first.

    `warm_share`: of the architecture's numbers, the share that the weights it starts from have.
    """

    spec: RunSpec
    state: State
    why: str
    code_hash: str
    superseding: bool = False
    epochs_done: int = 0
    estimate: Estimate | None = None
    warm_share: float | None = None

    @property
    def trains(self) -> bool:
        """True if a Ray job has to run."""
        return self.state in {"train", "resume"}


def plan_cells(
    specs: Sequence[RunSpec], settings: Settings, on_code_change: OnCodeChange = "warn"
) -> list[PlannedCell]:
    """Plan every cell, with an estimate for those that need training."""
    # Every cell of an architecture is trained by the same code, which takes a second to read.
    code_hashes = {name: _code_hash(name) for name in {spec.architecture.name for spec in specs}}
    planned = [plan_cell(spec, settings, on_code_change, code_hashes[spec.architecture.name]) for spec in specs]
    pace = _Pace(settings.storage)

    def expected(cell: PlannedCell) -> PlannedCell:
        return replace(cell, estimate=pace.estimate(cell), warm_share=_warm_share(cell.spec, settings))

    return [expected(cell) if cell.trains else cell for cell in planned]


def _warm_share(spec: RunSpec, settings: Settings) -> float | None:
    weights = spec.training.warm_start
    return None if weights is None else fit(spec, warm_start_path(settings.storage, weights)).share


def plan_cell(
    spec: RunSpec, settings: Settings, on_code_change: OnCodeChange = "warn", code_hash: str | None = None
) -> PlannedCell:
    """Decide from what lies in storage whether a cell is done, half done or new. Raises StorageUnavailable.

    `code_hash`: of the code that would train it, where that is known already.
    """
    run_folder, mirror = settings.storage / spec.run_key, Mirror(settings, spec.run_key)
    mirror.pull()
    code_hash = code_hash or _code_hash(spec.architecture.name)
    damaged = ""
    try:
        result = _read_result(mirror)
    except CorruptResult as error:
        result, damaged = None, f"its result is damaged: {str(error).splitlines()[0]}"
    if result is not None:
        return _plan_finished(spec, result, code_hash, on_code_change)
    for folder in newest_first(run_folder):
        try:
            # On S3, the worker that goes on from it will see whether it is whole.
            manifest = verify_checkpoint(folder) if settings.storage_url is None else read_manifest(folder)
        except CorruptCheckpoint:
            continue
        why = damaged or f"stopped after epoch {manifest.epoch} of {spec.training.epochs}"
        before = latest_code_hash(run_folder)
        if before is not None and before != code_hash:
            why += f", trained by other code ({before}, now {code_hash})"
            if on_code_change == "retrain":
                return PlannedCell(spec, "train", why, code_hash, superseding=True)
        return PlannedCell(spec, "resume", why, code_hash, epochs_done=manifest.epoch)
    return PlannedCell(spec, "train", damaged or "nothing was trained with this configuration and data", code_hash)


def _code_hash(architecture: str) -> str:
    return training_code_hash(REPO, models.ARCHITECTURES[architecture].build.__module__)


def _read_result(mirror: Mirror) -> RunResult | None:
    try:
        return read_result(mirror.folder)
    except CorruptResult:
        # Perhaps only here.
        mirror.pull(afresh=True)
        return read_result(mirror.folder)


def _plan_finished(spec: RunSpec, result: RunResult, code_hash: str, on_code_change: OnCodeChange) -> PlannedCell:
    finished = f"finished {time.strftime('%Y-%m-%d %H:%M', time.localtime(result.finished_ms / 1000))}"
    other_code = f"{finished} by other code ({result.code_hash}, now {code_hash})"
    stale = result.code_hash != code_hash
    if stale and on_code_change == "retrain":
        return PlannedCell(spec, "train", other_code, code_hash, superseding=True)
    if result.scores["test"].score_key != score_key(spec.dataset.card.protocol, score_options(spec)):
        return PlannedCell(spec, "score", "trained, but scored under other options or by other code", code_hash)
    if stale:
        return PlannedCell(spec, "stale", f"{other_code}; --on-code-change retrain trains it again", code_hash)
    return PlannedCell(spec, "cached", finished, code_hash)


@dataclass(frozen=True)
class _Speed:
    """Seconds per image over all workers, seconds beside these, bytes of a run's folder."""

    train_s_per_image: float
    score_s_per_image: float
    overhead_s: float
    disk_bytes: int
    source: str


class _Pace:
    """Speeds by kind of cell, each found out once."""

    def __init__(self, storage: Path) -> None:
        self._finished = _finished_runs(storage)
        self._known: dict[str, _Speed | None] = {}
        self._num_images: dict[str, dict[str, int]] = {}

    def estimate(self, cell: PlannedCell) -> Estimate | None:
        """The rest of a cell's training and its scoring; None where nothing can be said."""
        spec, training = cell.spec, cell.spec.training
        if spec.dataset.name not in self._num_images:
            self._num_images[spec.dataset.name] = summarise(spec.dataset.name, REPO).num_images
        counts = self._num_images[spec.dataset.name]
        if not counts:
            return None
        kind = str(_kind(spec))
        if kind not in self._known:
            self._known[kind] = self._speed(cell)
        speed = self._known[kind]
        if speed is None:
            return None
        epochs = range(cell.epochs_done + 1, training.epochs + 1)
        every = training.validate_every_epochs
        validations = sum(epoch % every == 0 or epoch == training.epochs for epoch in epochs)
        seconds = len(epochs) * counts["train"] * speed.train_s_per_image
        seconds += (validations * counts["val"] + counts["test"]) * speed.score_s_per_image + speed.overhead_s
        return Estimate(seconds, speed.disk_bytes, speed.source)

    def _speed(self, cell: PlannedCell) -> _Speed | None:
        spec = cell.spec
        alike = [(folder, result) for folder, result in self._finished if _kind(result.spec) == _kind(spec)]
        if alike:
            folder, result = max(alike, key=lambda pair: pair[1].finished_ms)
            return _measured(folder, result)
        try:
            probed = _probe(spec, cell.code_hash, default_root() / PROBES)
        except Exception:
            # An architecture that does not run is the fault of its own cells: they will say why.
            return None
        return None if probed is None else _probed(probed, spec.compute)


def _kind(spec: RunSpec) -> tuple[Any, ...]:
    """Cells of one kind train and score an image in the same time."""
    training, compute = spec.training, spec.compute
    per_worker = (compute.workers, compute.cpus_per_worker, compute.gpus_per_worker)
    settings = tuple(sorted((name, str(value)) for name, value in spec.architecture.settings.items()))
    sizes = (training.input_size_px, training.batch_size, training.precision, training.optimizer, training.freeze)
    return (spec.architecture.name, settings, sizes, per_worker)


def _finished_runs(storage: Path) -> list[tuple[Path, RunResult]]:
    found = []
    for path in sorted(storage.glob("*/result.json")):
        try:
            found.append((path.parent, RunResult.model_validate_json(path.read_bytes())))
        except (OSError, ValueError):
            continue  # The plan of its own cell says that it is damaged.
    return found


def _measured(folder: Path, result: RunResult) -> _Speed | None:
    entries = read_journal(folder)
    train_s = sum(entry.metrics.get("time/train_s", 0.0) for entry in entries)
    images = sum(_images_trained(entry) for entry in entries)
    if not images:
        return None
    in_job = [entry for entry in entries if entry.attempt == result.attempts]
    busy = sum(entry.seconds for entry in in_job) + result.seconds["score_test"]
    return _Speed(
        train_s_per_image=train_s / images,
        score_s_per_image=result.seconds["score_test"] / max(1, result.scores["test"].counts["num_images"]),
        overhead_s=max(0.0, result.seconds["job"] - busy) + OUTSIDE_JOB_S,
        disk_bytes=folder_bytes(folder),
        source=f"run {result.run_key}",
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # A worker may be tidying up.
            total += path.stat().st_size if path.is_file() else 0
    return total


def _images_trained(entry: JournalEntry) -> float:
    return entry.metrics.get("train/images_per_s", 0.0) * entry.metrics.get("time/train_s", 0.0)


def _probe(spec: RunSpec, code_hash: str, folder: Path) -> Probe | None:
    """How fast a kind of cell is on this machine, by a probe of today if there was one: each takes seconds."""
    identity = (_kind(spec), code_hash)
    path = folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, TypeError):
        if time.time() - path.stat().st_mtime < PROBE_HOLDS_S:
            return Probe(**json.loads(path.read_bytes()))
    found = probe(spec)
    if found is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    return found


def _probed(found: Probe, compute: ComputeSpec) -> _Speed:
    workers = compute.max_workers
    # The latest, and the best beside them.
    num_checkpoints = compute.keep_checkpoints + 1
    return _Speed(
        train_s_per_image=found.train_s_per_image / workers,
        score_s_per_image=found.score_s_per_image / workers,
        overhead_s=OVERHEAD_S,
        disk_bytes=num_checkpoints * found.checkpoint_bytes + found.checkpoint_bytes // 4 + PICTURES_BYTES,
        source="probe",
    )

"""The training loop, without Ray, MLflow or printing: one run from its spec to scored weights.

Every rank executes the same lines; what differs is the share of each global batch it sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data.batch import Batch, collate
from data.loader import DetectionDataset, init_worker
from data.sampler import GlobalBatchSampler
from models.interface import Targets
from training.meter import Meter, Progress
from training.optimizer import learning_rate_at, set_learning_rate
from training.scoring import Scored, score_split, validate
from training.spec import RunSpec
from training.state import TrainingState, WarmStart, build_state, restore, save, set_training_mode, warm_start
from training.workers import Workers

MAX_NON_FINITE_STEPS = 20


class Diverged(RuntimeError):
    """The loss was not finite for too many steps in a row, or weights are not."""


@dataclass
class Hooks:
    """What the surroundings do with news. All ranks call all but `progress`, which is for rank 0.

    `report(metrics, step, epoch, save)`: `save(folder, report)` writes a checkpoint there.
    `skipped`: the training images that an epoch could not read.
    """

    report: Callable[[dict[str, float], int, int, Callable[..., object]], None]
    progress: Callable[[Progress], None] = field(default=lambda _: None)
    warm_started: Callable[[WarmStart], None] = field(default=lambda _: None)
    skipped: Callable[[list[Path]], None] = field(default=lambda _: None)


def train(
    spec: RunSpec,
    dataset_folder: Path,
    workers: Workers,
    hooks: Hooks,
    checkpoint: Path | None = None,
    initial_weights: Path | None = None,
    cache_folder: Path | None = None,
) -> tuple[TrainingState, Scored | None]:
    """Train to the last epoch, from `checkpoint` when given, else from `initial_weights` when given.

    Decoded pictures that do not fit into memory are kept in `cache_folder`, when given; see `DetectionDataset`.

    Returns the final state, and on rank 0 the score of its weight average on the validation split.

    Raises:
        ValueError: the training split is smaller than one global batch.
        UnfitWeights: see `warm_start`.
        BadFreeze: the spec freezes what the architecture does not have.
        TooManyUnreadable: see `DetectionDataset.unreadable_paths`.
        Diverged: the loss was not finite for MAX_NON_FINITE_STEPS steps in a row or a whole epoch, or a weight is not.
    """
    torch.manual_seed(spec.seed)
    state = build_state(spec, workers.device)
    if checkpoint is not None:
        restore(state, checkpoint)
    elif initial_weights is not None:
        hooks.warm_started(warm_start(state, initial_weights))
    parallel = DistributedDataParallel(state.model) if workers.world_size > 1 else state.model
    dataset, sampler, loader = _training_data(spec, dataset_folder, workers, cache_folder)
    validation: Scored | None = None
    is_validated = False
    while state.epoch < spec.training.epochs:
        started = time.monotonic()
        closing = state.epoch >= spec.training.epochs - spec.training.closing_epochs
        dataset.set_epoch(state.epoch, joins=not closing)
        sampler.set_epoch(state.epoch)
        metrics = train_one_epoch(spec, state, parallel, loader, workers, hooks, closing=closing)
        workers.share_buffers(state.model, state.average)
        _require_finite(state, len(loader))
        metrics["time/train_s"] = time.monotonic() - started
        metrics["train/images_left_out"] = float(sampler.num_dropped)
        metrics["train/boxes_too_small"] = float(dataset.num_boxes_too_small)
        skipped = count_unreadable(dataset, workers)
        metrics["train/images_skipped"] = float(len(skipped))
        if skipped:
            hooks.skipped(skipped)
        metrics["train/images_per_s"] = len(loader) * spec.training.batch_size / metrics["time/train_s"]
        state.epoch += 1
        is_last = state.epoch == spec.training.epochs
        if is_last or state.epoch % spec.training.validate_every_epochs == 0:
            validating, average = time.monotonic(), state.average.module
            scores: Mapping[str, float | None] = {}
            if is_last:
                # What is reported in the end is looked at once, and in full.
                validation = score_split(spec, average, dataset_folder, "val", workers, cache_folder)
                is_validated = True
                scores = {} if validation is None else validation.result.metrics
            else:
                scores = validate(spec, average, dataset_folder, workers, cache_folder)
            metrics |= {
                f"val/{name}": value for name, value in scores.items() if value is not None and name.startswith("coco/")
            }
            metrics["time/validate_s"] = time.monotonic() - validating
        hooks.report(metrics, state.step, state.epoch, partial(save, spec, state))
    if not is_validated:
        validation = score_split(spec, state.average.module, dataset_folder, "val", workers, cache_folder)
    return state, validation


def train_one_epoch(
    spec: RunSpec,
    state: TrainingState,
    parallel: nn.Module,
    loader: DataLoader[Any],
    workers: Workers,
    hooks: Hooks,
    *,
    closing: bool,
) -> dict[str, float]:
    """One pass over the training split; the mean of every loss term, each divided over the global batch."""
    set_training_mode(state.model, spec)
    meter = Meter(spec, steps_per_epoch=len(loader), first_step=state.step)
    for batch in _timed(loader, meter):
        learning_rate = learning_rate_at(state.step, len(loader), spec.training)
        set_learning_rate(state.optimizer, learning_rate)
        images, targets = to_device(batch, workers.device)
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=spec.training.precision == "bf16"):
            predictions = parallel(images)
        losses = state.detector.criterion(predictions, targets, closing=closing)
        sums, counts = (
            torch.stack(list(losses.sums.values())),
            torch.stack([losses.counts[term] for term in losses.sums]),
        )
        # One small all-reduce carries the counts, and what goes into the log: a loss that is not finite on
        # one rank is then not finite on all, and all of them skip together.
        extra = torch.stack([*losses.metrics.values(), sums.new_zeros(())])
        reduced = workers.sum(torch.cat([counts, sums.detach(), extra / workers.world_size]))
        total_counts, total_sums, mean_extra = reduced.split([len(counts), len(sums), len(extra)])
        total_counts = total_counts.clamp(min=1)
        means = dict(zip(losses.sums, (total_sums / total_counts).tolist(), strict=True))
        state.step += 1
        if not all(math.isfinite(mean) for mean in means.values()):
            state.skipped_in_a_row += 1
            meter.non_finite_steps += 1
            if state.skipped_in_a_row >= MAX_NON_FINITE_STEPS:
                raise Diverged(
                    f"the loss was not finite for {state.skipped_in_a_row} steps in a row, up to step {state.step} "
                    f"(learning rate {learning_rate:.3g}); lower training.learning_rate or set training.precision=fp32"
                )
            continue
        state.skipped_in_a_row = 0
        # DistributedDataParallel averages gradients over ranks; the sum of all ranks is wanted.
        loss = (sums / total_counts).sum() * workers.world_size
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        state.average.update_parameters(state.model)
        meter.update(means, dict(zip(losses.metrics, mean_extra.tolist(), strict=False)))
        if workers.rank == 0 and (news := meter.news(state)) is not None:
            hooks.progress(news)
    return meter.means() | {"train/learning_rate": learning_rate_at(max(state.step - 1, 0), len(loader), spec.training)}


def count_unreadable(dataset: DetectionDataset, workers: Workers) -> list[Path]:
    """Files that any rank could not read in this epoch, on all ranks. Raises TooManyUnreadable."""
    num_ranks = workers.sum(dataset.unreadable.to(workers.device, torch.int32))
    return dataset.unreadable_paths(num_ranks > 0)


def _require_finite(state: TrainingState, steps_per_epoch: int) -> None:
    """Raise Diverged rather than keep, score and promote what an epoch left behind."""
    weights = {**state.model.state_dict(), **state.average.module.state_dict(prefix="average.")}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken or state.skipped_in_a_row >= steps_per_epoch:
        what = f"{len(broken)} weights, {broken[0]} first, were" if broken else "the loss of every step was"
        raise Diverged(
            f"{what} not finite in epoch {state.epoch + 1}; lower training.learning_rate or set training.precision=fp32"
        )


def _training_data(
    spec: RunSpec, folder: Path, workers: Workers, cache_folder: Path | None
) -> tuple[DetectionDataset, GlobalBatchSampler, DataLoader[Any]]:
    training, compute = spec.training, spec.compute
    dataset = DetectionDataset(
        folder,
        "train",
        input_size_px=training.input_size_px,
        augment=training.augment,
        seed=spec.seed,
        repeat_threshold=training.repeat_threshold,
        cache_bytes=int(compute.cache_gib * 2**30),
        cache_folder=cache_folder,
    )
    sampler = GlobalBatchSampler(
        len(dataset),
        global_batch=training.batch_size,
        rank=workers.rank,
        world_size=workers.world_size,
        seed=spec.seed,
        repeat_factors=dataset.repeat_factors,
    )
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=compute.loader_processes,
        # Each process knows which cached pictures it has compared with their checksums.
        persistent_workers=compute.loader_processes > 0,
        worker_init_fn=init_worker,
        pin_memory=workers.device.type == "cuda",
    )
    return dataset, sampler, loader


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Targets]:
    """Images in channels-last memory order and the targets of a batch, on `device`."""
    images = batch.images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    targets = Targets(
        boxes_xyxy_px=batch.boxes_xyxy_px.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        image_index=batch.image_index.to(device, non_blocking=True),
        ignore_xyxy_px=batch.ignore_xyxy_px.to(device, non_blocking=True),
        ignore_image_index=batch.ignore_image_index.to(device, non_blocking=True),
    )
    return images, targets


def _timed(loader: DataLoader[Any], meter: Meter) -> Iterator[Batch]:
    iterator = iter(loader)
    while True:
        started = time.monotonic()
        batch = next(iterator, None)
        meter.data_wait_s += time.monotonic() - started
        if batch is None:
            return
        yield batch

"""The training loop, without Ray, MLflow or printing: one run from its spec to scored weights.

Every rank executes the same lines; what differs is the share of each global batch it sees.
`torchrun -m training.loop SPEC` runs it where there is no Ray, see `training.torchrun`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data.loader import DetectionDataset
from data.sampler import GlobalBatchSampler
from training.errors import Diverged, Preempted, Stopped
from training.feeding import count_unreadable, to_device, training_data
from training.meter import Meter, Progress
from training.optimizer import learning_rate_at, set_learning_rate
from training.requests import Asked
from training.scoring import Scored, score_split, validate
from training.shares import StepClock
from training.spec import RunSpec
from training.state import (
    TrainingState,
    WarmStart,
    build_state,
    recover_statistics,
    restore,
    save,
    set_training_mode,
    warm_start,
)
from training.step import accumulate, forward_backward
from training.sync_batch_norm import convert
from training.workers import Workers

MAX_NON_FINITE_STEPS = 20


@dataclass
class Hooks:
    """What the surroundings do with news. All ranks call all but `progress`, which is for rank 0.

    `report(metrics, step, epoch, save)` at the end of an epoch, `checkpoint(step, epoch, save, is_ending)` within one,
    where it was asked for: `save(folder, report)` writes a checkpoint there. `settle`: before all end, waits until what
    was kept is in the storage. `asked`: what this worker is asked at a step. `skipped`: the training images that an
    epoch could not read. `alive`: called again and again as long as there is progress. `stepped(left)`: after every
    step; how many the epoch has left.
    """

    report: Callable[[dict[str, float], int, int, Callable[..., Any]], None]
    checkpoint: Callable[[int, int, Callable[..., Any], bool], None] = field(default=lambda *_: None)
    settle: Callable[[], None] = field(default=lambda: None)
    asked: Callable[[], Asked] = field(default=Asked)
    alive: Callable[[], None] = field(default=lambda: None)
    stepped: Callable[[int], None] = field(default=lambda _: None)
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
    accumulation: int | None = None,
) -> tuple[TrainingState, Scored | None]:
    """Train to the last epoch, from `checkpoint` when given, else from `initial_weights` when given.

    Decoded pictures that do not fit into memory are kept in `cache_folder`, when given; see `DetectionDataset`.
    `accumulation`: more parts of a batch than the spec says, where memory is short.

    Returns the final state, and on rank 0 the score of its weight average on the validation split.

    Raises:
        ValueError: the training split is smaller than one global batch.
        UnfitWeights: see `warm_start`.
        BadFreeze: the spec freezes what the architecture does not have.
        TooManyUnreadable: see `DetectionDataset.unreadable_paths`.
        Diverged: the loss was not finite for MAX_NON_FINITE_STEPS steps in a row or a whole epoch, or a weight is not.
        Preempted, Stopped: any rank was asked to leave or to stop; `hooks.checkpoint` has been called.
    """
    torch.manual_seed(spec.seed)
    state = build_state(spec, workers.device)
    if checkpoint is not None:
        restore(state, checkpoint)
    elif initial_weights is not None:
        hooks.warm_started(warm_start(state, initial_weights))
    parallel = _in_parallel(spec, state, workers)
    dataset, sampler, loader = training_data(spec, dataset_folder, workers, cache_folder)
    parts = min(accumulation or spec.training.accumulation, spec.training.batch_size // workers.world_size)
    average = state.average.module
    score_val = partial(score_split, spec, average, dataset_folder, "val", workers, cache_folder, alive=hooks.alive)
    scores: Mapping[str, float | None]
    validation: Scored | None = None
    is_validated = False
    while state.epoch < spec.training.epochs and not _is_out_of_patience(spec, state):
        closing = state.epoch >= spec.training.epochs - spec.training.closing_epochs
        dataset.set_epoch(state.epoch, joins=not closing)
        sampler.set_epoch(state.epoch, first_step=state.steps_in_epoch)
        metrics = train_one_epoch(spec, state, parallel, loader, workers, hooks, closing=closing, parts=parts)
        workers.share_buffers(state.model, state.average)
        broken = _not_finite(state)
        if broken or state.skipped_in_a_row >= sampler.steps_per_epoch:
            hooks.settle()
            raise _diverged(broken or "the loss of every step was", state)
        metrics |= _left_out(dataset, sampler, workers, hooks)
        state.epoch, state.steps_in_epoch, state.so_far = state.epoch + 1, 0, {}
        is_last = state.epoch == spec.training.epochs
        if is_last or state.epoch % spec.training.validate_every_epochs == 0:
            validating = time.monotonic()
            if is_last:
                # What is reported in the end is looked at once, and in full.
                validation, is_validated = score_val(), True
                scores = {} if validation is None else validation.result.metrics
            else:
                scores = validate(spec, average, dataset_folder, workers, cache_folder, alive=hooks.alive)
            metrics |= {
                f"val/{name}": value for name, value in scores.items() if value is not None and name.startswith("coco/")
            }
            metrics["time/validate_s"] = time.monotonic() - validating
            if spec.training.patience_epochs is not None:
                _remember_best(state, workers.broadcast(scores.get("coco/AP")))
        hooks.report(metrics, state.step, state.epoch, partial(save, spec, state))
    if state.best_epoch not in {0, state.epoch}:
        average.load_state_dict(state.best)
        is_validated = False
    return state, validation if is_validated else score_val()


def train_one_epoch(
    spec: RunSpec,
    state: TrainingState,
    parallel: nn.Module,
    loader: DataLoader[Any],
    workers: Workers,
    hooks: Hooks,
    *,
    closing: bool,
    parts: int = 1,
) -> dict[str, float]:
    """One pass over what is left of the epoch; the mean of every loss term, each divided over the global batch."""
    set_training_mode(state.model, spec)
    training, steps_per_epoch = spec.training, len(loader) + state.steps_in_epoch
    meter, clock = Meter(spec, steps_per_epoch, state), StepClock(workers.device)
    begun_at, begun_s = state.step, meter.seconds
    for batch in clock.waited(loader):
        learning_rate = learning_rate_at(state.step, steps_per_epoch, training)
        set_learning_rate(state.optimizer, learning_rate)
        images, targets = to_device(batch, workers.device)
        clock.lap("transfer")
        asked = hooks.asked()
        if parts == 1:
            step = forward_backward(
                state, parallel, images, targets, workers, clock, training, closing=closing, asked=asked
            )
        else:
            step = accumulate(
                state, images, targets, workers, clock, training, parts=parts, closing=closing, asked=asked
            )
        state.step += 1
        state.steps_in_epoch += 1
        if step.is_finite:
            state.skipped_in_a_row = 0
            extra = dict(step.metrics)
            if training.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(state.model.parameters(), training.clip_norm, foreach=True)
                extra["gradient_norm"] = float(norm)
            state.optimizer.step()
            state.average.update_parameters(state.model)
            meter.update(step.means, extra)
        else:
            meter.skip()
            recover_statistics(state)
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= MAX_NON_FINITE_STEPS:
                hooks.settle()
                raise Diverged(
                    f"the loss was not finite for {state.skipped_in_a_row} steps in a row, up to step {state.step} "
                    f"(learning rate {learning_rate:.3g}); lower training.learning_rate or set training.precision=fp32"
                )
        clock.lap("optimizer")
        hooks.alive()
        hooks.stepped(steps_per_epoch - state.steps_in_epoch)
        if workers.rank == 0 and step.is_finite and (news := meter.news(state)) is not None:
            hooks.progress(news)
        _answer(spec, state, step.asked, meter, hooks)
        clock.lap("report")
    num_steps, seconds = state.step - begun_at, meter.seconds
    return (
        meter.means()
        | clock.shares(parallel, num_steps, seconds - begun_s)
        | {
            "train/learning_rate": learning_rate_at(max(state.step - 1, 0), steps_per_epoch, training),
            "train/images_per_s": steps_per_epoch * training.batch_size / seconds,
            "train/accumulation": float(parts),
            "time/train_s": seconds,
        }
    )


def _left_out(
    dataset: DetectionDataset, sampler: GlobalBatchSampler, workers: Workers, hooks: Hooks
) -> dict[str, float]:
    """What no step of an epoch saw, as metrics. Raises TooManyUnreadable."""
    skipped = count_unreadable(dataset, workers)
    if skipped:
        hooks.skipped(skipped)
    return {
        "train/images_left_out": float(sampler.num_dropped),
        "train/boxes_too_small": float(dataset.num_boxes_too_small),
        "train/images_skipped": float(len(skipped)),
    }


def _answer(spec: RunSpec, state: TrainingState, asked: Asked, meter: Meter, hooks: Hooks) -> None:
    """Keep what was reached, within an epoch, when any rank was asked to; end when one has to leave or to stop."""
    if not any(asked) or (asked == Asked(checkpoint=True) and state.steps_in_epoch == meter.steps_per_epoch):
        return
    if broken := _not_finite(state):
        raise _diverged(broken, state)
    state.so_far = meter.so_far()
    is_ending = asked.leave or asked.stop
    hooks.checkpoint(state.step, state.epoch, partial(save, spec, state), is_ending)
    if is_ending:
        hooks.settle()
    if asked.leave:
        raise Preempted(f"a worker has to leave at step {state.step}")
    if asked.stop:
        raise Stopped(f"stopped at step {state.step}")


def _in_parallel(spec: RunSpec, state: TrainingState, workers: Workers) -> nn.Module:
    """The model as it is called in training; its tensors are those of `state`."""
    if spec.training.compile:
        state.model.compile()
    if workers.world_size == 1:
        return state.model
    if spec.training.sync_batch_norm:
        convert(state.model, workers.device)
    # Buffers are the same everywhere, or are shared when an epoch ends.
    return DistributedDataParallel(state.model, forward_sync_buffers=False)


def _is_out_of_patience(spec: RunSpec, state: TrainingState) -> bool:
    patience = spec.training.patience_epochs
    return patience is not None and 0 < state.best_epoch <= state.epoch - patience


def _remember_best(state: TrainingState, ap: float | None) -> None:
    if ap is not None and ap > state.best_ap:
        state.best_ap, state.best_epoch = ap, state.epoch
        state.best = {name: value.clone() for name, value in state.average.module.state_dict().items()}


def _not_finite(state: TrainingState) -> str:
    """What must not be kept, scored and promoted; empty if all weights are finite."""
    weights = {**state.model.state_dict(), **state.average.module.state_dict(prefix="average.")}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    return f"{len(broken)} weights, {broken[0]} first, were" if broken else ""


def _diverged(what: str, state: TrainingState) -> Diverged:
    remedy = "lower training.learning_rate or set training.precision=fp32"
    return Diverged(f"{what} not finite in epoch {state.epoch + 1}; {remedy}")


if __name__ == "__main__":
    from training.torchrun import main

    main()

"""Forward and backward of one optimiser step: the gradients of a global batch, whoever has which part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.interface import Losses, Targets
from training.requests import Asked
from training.shares import StepClock
from training.spec import TrainingSpec
from training.state import TrainingState
from training.workers import Workers


@dataclass(frozen=True)
class Step:
    """`means` of every loss term over the global batch; `metrics` over workers; what any worker was `asked`."""

    means: dict[str, float]
    metrics: dict[str, float]
    asked: Asked

    @property
    def is_finite(self) -> bool:
        """False if any loss term is not finite, on any worker: then there are no gradients, on any worker."""
        return all(math.isfinite(mean) for mean in self.means.values())


def forward_backward(
    state: TrainingState,
    parallel: nn.Module,
    images: Tensor,
    targets: Targets,
    workers: Workers,
    clock: StepClock,
    training: TrainingSpec,
    *,
    closing: bool,
    asked: Asked,
) -> Step:
    """Set the gradients of every parameter to those of the mean loss over the global batch; `parallel` is in DDP.

    Every term is divided by its count over all workers, and in `accumulate` over all parts: the result does not depend
    on how the batch is spread.
    """
    with torch.autocast(workers.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        predictions = parallel(images)
    clock.lap("forward")
    losses = state.detector.criterion(predictions, targets, closing=closing)
    clock.lap("assignment")
    sums = torch.stack(list(losses.sums.values()))
    step, counts = _agree(losses, workers, asked)
    clock.lap("all_reduce")
    if step.is_finite:
        # DistributedDataParallel averages gradients over ranks; the sum of all ranks is wanted.
        loss = (sums / counts).sum() * workers.world_size
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
    clock.lap("backward")
    return step


def accumulate(
    state: TrainingState,
    images: Tensor,
    targets: Targets,
    workers: Workers,
    clock: StepClock,
    training: TrainingSpec,
    *,
    parts: int,
    closing: bool,
    asked: Asked,
) -> Step:
    """As `forward_backward`, in so many parts one after the other, of which one at a time is in memory.

    What a term is divided by is known when the last part is through. So gradients of sums add up, apart for each count
    that terms are divided by, and are divided in the end.
    """
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    gradients: list[list[Tensor]] = []
    total: Losses | None = None
    for part_images, part_targets in split(images, targets, parts):
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            predictions = state.model(part_images)
        clock.lap("forward")
        losses = state.detector.criterion(predictions, part_targets, closing=closing)
        clock.lap("assignment")
        groups = _terms_by_count(losses)
        for number, terms in enumerate(groups):
            found = torch.autograd.grad(
                torch.stack([losses.sums[term] for term in terms]).sum(),
                parameters,
                retain_graph=number + 1 < len(groups),
                allow_unused=True,
                materialize_grads=True,
            )
            if number == len(gradients):
                gradients.append(list(found))
            else:
                torch._foreach_add_(gradients[number], found)
        total = _added(total, losses)
        clock.lap("backward")
    assert total is not None
    step, counts = _agree(total, workers, asked)
    if step.is_finite:
        by_term = dict(zip(total.sums, counts, strict=True))
        scaled = [torch._foreach_div(found, by_term[terms[0]]) for found, terms in zip(gradients, groups, strict=True)]
        mean = scaled[0]
        for more in scaled[1:]:
            torch._foreach_add_(mean, more)
        workers.sum_all(mean)
        for parameter, gradient in zip(parameters, mean, strict=True):
            parameter.grad = gradient
    clock.lap("all_reduce")
    return step


def split(images: Tensor, targets: Targets, parts: int) -> Iterator[tuple[Tensor, Targets]]:
    """Cut a batch into runs of images whose lengths differ by one at most, with their targets."""
    first = 0
    for part in images.tensor_split(parts):
        end = first + len(part)
        boxes = (targets.image_index >= first) & (targets.image_index < end)
        regions = (targets.ignore_image_index >= first) & (targets.ignore_image_index < end)
        yield (
            part,
            Targets(
                boxes_xyxy_px=targets.boxes_xyxy_px[boxes],
                labels=targets.labels[boxes],
                image_index=targets.image_index[boxes] - first,
                ignore_xyxy_px=targets.ignore_xyxy_px[regions],
                ignore_image_index=targets.ignore_image_index[regions] - first,
            ),
        )
        first = end


def _agree(losses: Losses, workers: Workers, asked: Asked) -> tuple[Step, Tensor]:
    """The step as all workers see it, and every term's count over all of them, at least 1."""
    sums = torch.stack([value.detach() for value in losses.sums.values()])
    counts = torch.stack([losses.counts[term] for term in losses.sums])
    # One small all-reduce carries the counts, what goes into the log, and what was asked: a loss that is not finite on
    # one rank is then not finite on all, and all of them skip together.
    extra = torch.stack([*losses.metrics.values(), sums.new_zeros(())]) / workers.world_size
    reduced = workers.sum(torch.cat([counts, sums, extra, sums.new_tensor([float(flag) for flag in asked])]))
    total_counts, total_sums, mean_extra, flags = reduced.split([len(counts), len(sums), len(extra), len(asked)])
    total_counts = total_counts.clamp(min=1)
    means = dict(zip(losses.sums, (total_sums / total_counts).tolist(), strict=True))
    metrics = dict(zip(losses.metrics, mean_extra.tolist(), strict=False))
    return Step(means, metrics, Asked(*(flag > 0 for flag in flags.tolist()))), total_counts


def _terms_by_count(losses: Losses) -> list[list[str]]:
    """Terms that share the very tensor that they are divided by, together."""
    groups: dict[int, list[str]] = {}
    for term in losses.sums:
        groups.setdefault(id(losses.counts[term]), []).append(term)
    return list(groups.values())


def _added(total: Losses | None, more: Losses) -> Losses:
    """Sums and counts of both, without gradients; the later metrics stand for all."""
    if total is None:
        return Losses({name: value.detach() for name, value in more.sums.items()}, dict(more.counts), more.metrics)
    return Losses(_sum(total.sums, more.sums), _sum(total.counts, more.counts), more.metrics)


def _sum(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + two[name].detach() for name, value in one.items()}

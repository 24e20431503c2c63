"""Optimiser, learning-rate schedule and weight average: each a function of the step count alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.spec import TrainingSpec

Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(model: nn.Module, training: TrainingSpec) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW. Weight decay applies to convolution and linear weights only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(training.momentum, 0.999), fused=True)
    return torch.optim.SGD(
        groups, lr=training.learning_rate, momentum=training.momentum, nesterov=training.momentum > 0, fused=True
    )


def learning_rate_at(step: int, steps_per_epoch: int, training: TrainingSpec) -> float:
    """Quadratic warm-up from 0, cosine down to the final ratio, constant over the closing epochs.

    Source: training recipe of YOLOX (Ge et al. 2021).
    """
    warmup = training.warmup_epochs * steps_per_epoch
    end = (training.epochs - training.closing_epochs) * steps_per_epoch
    final = training.learning_rate * training.final_learning_rate_ratio
    if step < warmup:
        return training.learning_rate * ((step + 1) / warmup) ** 2 if warmup >= 1 else training.learning_rate
    if step >= end:
        return final
    progress = (step - warmup) / max(end - warmup, 1)
    return final + 0.5 * (training.learning_rate - final) * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def weight_average(model: nn.Module, training: TrainingSpec) -> AveragedModel:
    """Exponential moving average of weights and buffers, whose decay rises from 0: decay * (1 - exp(-t / ramp))."""
    device = next(model.parameters()).device
    return AveragedModel(
        model, device=device, multi_avg_fn=_ramped(training.ema_decay, training.ema_ramp_steps), use_buffers=True
    )


def _ramped(decay: float, ramp_steps: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(averages: Tensors, currents: Tensors, num_averaged: Tensor | int) -> None:
        weight = 1 - decay * (1 - math.exp(-int(num_averaged) / ramp_steps))
        if torch.is_floating_point(averages[0]):
            torch._foreach_lerp_(averages, currents, weight)
        else:
            torch._foreach_copy_(averages, currents)

    return update

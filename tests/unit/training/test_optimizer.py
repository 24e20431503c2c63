from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
from training.optimizer import build_optimizer, learning_rate_at, set_learning_rate, weight_average
from training.spec import TrainingSpec

STEPS = 10


def recipe(**changes: Any) -> TrainingSpec:
    values = {"epochs": 12, "learning_rate": 0.02, "warmup_epochs": 2.0, "closing_epochs": 3, "precision": "fp32"}
    return TrainingSpec(**values | {"final_learning_rate_ratio": 0.1} | changes)


def test_warm_up_then_cosine_then_constant() -> None:
    """Quadratic to the peak at step 19, half a cosine over steps 20..89, 10% from step 90."""
    rates = np.array([learning_rate_at(step, STEPS, recipe()) for step in range(120)])
    step = np.arange(120)
    rising = 0.02 * ((step + 1) / 20) ** 2
    falling = 0.002 + 0.018 * np.cos(math.pi / 2 * (step - 20) / 70) ** 2
    expected = np.where(step < 20, rising, np.where(step < 90, falling, 0.002))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert rates[0] == pytest.approx(0.02 / 400)
    assert rates[19] == pytest.approx(rates.max()) == pytest.approx(0.02)
    assert rates[55] == pytest.approx((0.02 + 0.002) / 2)


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        ({"warmup_epochs": 0.0}, 0, 0.02),
        ({"warmup_epochs": 0.25}, 1, 0.02 * (2 / 2.5) ** 2),
        ({"warmup_epochs": 0.05}, 0, 0.02),
        ({"closing_epochs": 0, "warmup_epochs": 0.0}, 60, 0.011),
        ({"closing_epochs": 12, "warmup_epochs": 0.0}, 0, 0.002),
        ({"warmup_epochs": 20.0}, 119, 0.02 * (120 / 200) ** 2),
        ({"final_learning_rate_ratio": 1.0}, 77, 0.02),
    ],
)
def test_corner_cases_of_the_schedule(changes: dict[str, Any], step: int, expected: float) -> None:
    assert learning_rate_at(step, STEPS, recipe(**changes)) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_applies_to_the_weights_of_convolutions_alone(optimizer: str) -> None:
    model: Any = models.build("yolox-nano", num_classes=3, width=0.125)
    built = build_optimizer(model, recipe(optimizer=optimizer, weight_decay=0.05))
    weights = {id(part.weight) for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in built.param_groups) == len(decay) == len(list(model.parameters()))
    assert {key for key, value in decay.items() if value == 0.05} == weights
    assert {value for key, value in decay.items() if key not in weights} == {0.0}


def test_decay_and_nesterov_momentum_follow_their_formula() -> None:
    """Two steps of SGD with weight decay and Nesterov momentum, in NumPy."""
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, recipe(weight_decay=0.1, momentum=0.9))
    set_learning_rate(optimizer, 0.5)
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    velocity_w, velocity_b = np.zeros_like(weight), np.zeros_like(bias)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        gradient = 1 + 0.1 * weight
        velocity_w, velocity_b = 0.9 * velocity_w + gradient, 0.9 * velocity_b + 1
        weight -= 0.5 * (gradient + 0.9 * velocity_w)
        bias -= 0.5 * (1 + 0.9 * velocity_b)
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-5)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-5)


def test_the_average_follows_a_loop_over_weights_and_buffers() -> None:
    """a += (1 - d)(w - a) with d = 0.9 (1 - exp(-t / 4)); the first update copies; whole numbers are copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    average = weight_average(model, recipe(ema_decay=0.9, ema_ramp_steps=4.0))
    expected: dict[str, np.ndarray] = {}
    for t in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(4, 1, 8, 8))
        average.update_parameters(model)
        decay = 0.9 * (1 - math.exp(-t / 4))
        for name, value in model.state_dict().items():
            current = value.numpy().astype(np.float64)
            if t == 0 or not torch.is_floating_point(value):
                expected[name] = current
            else:
                expected[name] = expected[name] * decay + current * (1 - decay)
    averaged = average.module.state_dict()
    assert averaged.keys() == expected.keys()
    assert {"1.running_var", "1.num_batches_tracked"} <= averaged.keys()
    for name, value in averaged.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_on_channels_last_weights_are_those_of_the_plain_optimiser(kind: str) -> None:
    """A fused optimiser walks through memory, whatever order the weights and gradients lie in."""
    torch.manual_seed(0)
    training = TrainingSpec(optimizer=kind, learning_rate=0.1, weight_decay=0.01)
    nets = [nn.Conv2d(3, 5, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0].to(memory_format=torch.channels_last)
    decayed = [{"params": [nets[1].weight], "weight_decay": 0.01}, {"params": [nets[1].bias], "weight_decay": 0.0}]
    plain = {
        "adamw": lambda: torch.optim.AdamW(decayed, lr=0.1, betas=(training.momentum, 0.999), foreach=False),
        "sgd": lambda: torch.optim.SGD(decayed, lr=0.1, momentum=training.momentum, nesterov=True, foreach=False),
    }[kind]()
    fused = build_optimizer(nets[0], training)
    pictures = torch.randn(4, 3, 9, 9)
    for _ in range(3):
        for net, optimizer in zip(nets, (fused, plain), strict=True):
            optimizer.zero_grad()
            # The mean: a sum makes steps so large that the weights run away, and rounding with them.
            net(pictures).square().mean().backward()
            optimizer.step()
    assert fused.defaults["fused"]
    torch.testing.assert_close(nets[0].weight, nets[1].weight)

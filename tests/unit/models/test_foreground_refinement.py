"""The refinement module: against NumPy, in limits of known result, and under what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.foreground_probe import ForegroundRefinement, mixed_attention


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refinement(channels: int = 8, fixed_gate: float | None = None) -> ForegroundRefinement:
    torch.manual_seed(0)
    return ForegroundRefinement(channels, fixed_gate)


def tokens(num_images: int = 2, num_tokens: int = 6, channels: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Regression and classification features."""
    return normal(num_images, num_tokens, channels, seed=1), normal(num_images, num_tokens, channels, seed=2)


def attention_by_hand(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    logits = query @ key.T / math.sqrt(query.shape[1])
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
def test_the_attention_is_the_gated_mix_of_two_softmaxes(gate: float) -> None:
    q_reg, k_reg, q_cls, k_cls, values = (2 * normal(1, 7, 5, seed=i) for i in range(5))
    got = mixed_attention((q_reg, k_reg), (q_cls, k_cls), values, torch.tensor([gate]))
    by_regression = attention_by_hand(q_reg[0].double().numpy(), k_reg[0].double().numpy())
    by_class = attention_by_hand(q_cls[0].double().numpy(), k_cls[0].double().numpy())
    mixed = gate * by_regression + (1 - gate) * by_class
    np.testing.assert_allclose(got[0].numpy(), mixed @ values[0].double().numpy(), rtol=1e-4, atol=1e-5)
    if gate == 1.0:
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q_reg, k_reg, values))


@pytest.mark.parametrize("gate", [0.0, 0.25, 0.5, 1.0])
def test_rows_of_the_attention_sum_to_one_for_any_gate(gate: float) -> None:
    """With the identity as values, what comes out is the K x K matrix itself."""
    num_tokens = 9
    q_reg, k_reg, q_cls, k_cls = (3 * normal(2, num_tokens, 9, seed=i) for i in range(4))
    identity = torch.eye(num_tokens).expand(2, -1, -1)
    matrix = mixed_attention((q_reg, k_reg), (q_cls, k_cls), identity, torch.full((2,), gate))
    assert matrix.shape == (2, num_tokens, num_tokens)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, num_tokens))
    assert matrix.std() > 0.05


def test_under_gate_zero_constant_class_features_average_the_values() -> None:
    q_reg, k_reg, values = (normal(2, 6, 4, seed=i) for i in range(3))
    constant = normal(2, 1, 4, seed=3).expand(-1, 6, -1)
    got = mixed_attention((q_reg, k_reg), (constant, constant), values, torch.zeros(2))
    torch.testing.assert_close(got, values.mean(1, keepdim=True).expand(-1, 6, -1))


def test_one_token_attends_to_itself() -> None:
    q_reg, k_reg, q_cls, k_cls, values = (normal(3, 1, 4, seed=i) for i in range(5))
    got = mixed_attention((q_reg, k_reg), (q_cls, k_cls), values, torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(got, values)


def test_gate_one_does_not_see_class_features_and_gate_zero_does() -> None:
    regression, classification = tokens()
    other = classification.flip(1) * 2
    for gate, same in ((1.0, True), (0.0, False), (0.5, False)):
        module = refinement(fixed_gate=gate)
        assert torch.equal(module(regression, classification)[0], module(regression, other)[0]) is same


def test_a_learned_gate_lies_between_zero_and_one_and_differs_by_image() -> None:
    regression, classification = tokens(num_images=16)
    gate = refinement()(regression * 5, classification * 5)[1]
    assert gate.shape == (16,)
    assert ((gate > 0) & (gate < 1)).all()
    assert len(gate.unique()) == 16


def test_a_gate_without_weights_is_one_half() -> None:
    module = refinement()
    nn.init.zeros_(module.gate.weight)
    assert module(*tokens())[1].tolist() == [0.5, 0.5]


def test_refined_logits_follow_equations_three_to_six() -> None:
    module, features = refinement(), [4 * x for x in tokens()]
    logits, gates = (x.detach().numpy() for x in module(*features))
    weights = {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}
    q_reg, k_reg, value = weights["regression_projection.weight"].reshape(3, 8, 8)
    q_cls, k_cls = weights["class_projection.weight"].reshape(2, 8, 8)
    for image in range(2):
        reg, cls = (x[image].double().numpy() for x in features)
        gate = 1 / (1 + np.exp(-weights["gate.weight"][0] @ np.concatenate((reg.mean(0), cls.mean(0)))))
        by_regression, by_class = (
            attention_by_hand(reg @ q_reg.T, reg @ k_reg.T),
            attention_by_hand(cls @ q_cls.T, cls @ k_cls.T),
        )
        attention = gate * by_regression + (1 - gate) * by_class
        refined = np.concatenate((reg, attention @ (reg @ value.T)), axis=1)
        expected = refined @ weights["score.weight"][0] + weights["score.bias"]
        assert gates[image] == pytest.approx(gate, rel=1e-5)
        np.testing.assert_allclose(logits[image], expected, rtol=1e-4, atol=1e-4)


def test_refinement_permutes_with_its_tokens() -> None:
    module, (regression, classification) = refinement(), tokens()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    logits, gate = module(regression, classification)
    permuted, permuted_gate = module(regression[:, order], classification[:, order])
    torch.testing.assert_close(permuted, logits[:, order])
    torch.testing.assert_close(permuted_gate, gate)
    assert logits.std() > 0.01


def test_a_score_head_without_weights_gives_its_bias() -> None:
    module = refinement()
    assert module.score.bias.sigmoid().item() == pytest.approx(0.01)
    nn.init.zeros_(module.score.weight)
    nn.init.constant_(module.score.bias, math.log(0.3 / 0.7))
    assert module(*tokens())[0].sigmoid().flatten().tolist() == pytest.approx([0.3] * 12)


@pytest.mark.parametrize(("fixed_gate", "dead"), [(None, False), (0.0, False), (0.5, False), (1.0, True)])
def test_the_class_path_is_dead_only_under_gate_one(fixed_gate: float | None, dead: bool) -> None:
    module = refinement(fixed_gate=fixed_gate)
    regression, classification = (features.requires_grad_() for features in tokens())
    module(regression, classification)[0].sum().backward()
    assert regression.grad.abs().sum(2).all()
    assert (classification.grad == 0).all() if dead else classification.grad.abs().sum(2).all()
    # Queries and keys of both kinds, and the values: scores also see the box tower without any attention.
    by_regression = [part.any().item() for part in module.regression_projection.weight.grad.chunk(3)]
    by_class = [part.any().item() for part in module.class_projection.weight.grad.chunk(2)]
    assert by_regression == [fixed_gate != 0.0, fixed_gate != 0.0, True]
    assert by_class == [not dead, not dead]


def test_refinement_under_autocast_is_that_in_float32() -> None:
    """Tower features arrive in bfloat16; what is made of them is not rounded, the softmax least of all."""
    module = refinement()
    features = [(4 * x).bfloat16() for x in tokens()]
    expected = module(*(x.float() for x in features))
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*features)
        rounded = module.class_projection(features[1])
    assert rounded.dtype == torch.bfloat16
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted)

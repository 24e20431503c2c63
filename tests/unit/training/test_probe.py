"""What a plan measures, against a real training state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.probe import probe
from training.spec import RunSpec
from training.state import build_state


@pytest.mark.parametrize("training", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"freeze": ("backbone",)}])
def test_a_checkpoint_is_as_large_as_what_a_step_leaves(
    tiny_spec: Callable[..., RunSpec], training: dict[str, Any]
) -> None:
    spec = tiny_spec(**training)
    state = build_state(spec, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    kept = [*state.model.state_dict().values(), *state.average.state_dict().values()]
    kept += [value for slots in state.optimizer.state.values() for value in slots.values() if torch.is_tensor(value)]
    probed = probe(spec)
    assert probed is not None
    # Beside tensors of weights there are counters of a few bytes.
    assert probed.checkpoint_bytes == pytest.approx(sum(value.nbytes for value in kept), rel=0.02)


def test_it_leaves_the_process_as_it_was(tiny_spec: Callable[..., RunSpec]) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = probe(tiny_spec(input_size_px=32))
    assert found is not None
    assert min(found.train_s_per_image, found.score_s_per_image) > 0
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.checkpoint import file_sha256
from training.spec import RunSpec
from training.state import (
    BadFreeze,
    TrainingState,
    UnfitWeights,
    build_state,
    require_parts,
    set_training_mode,
    warm_start,
)

SOME = f"sha256:{'0' * 64}"


def keep(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "x.safetensors")
    return (folder / "x.safetensors").rename(folder / f"{file_sha256(folder / 'x.safetensors')}.safetensors")


@pytest.fixture
def state(tiny_spec: Callable[..., RunSpec]) -> TrainingState:
    torch.manual_seed(0)
    return build_state(tiny_spec(), torch.device("cpu"))


def test_all_tensors_are_taken_by_model_and_average(
    state: TrainingState, tiny_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = build_state(tiny_spec(), torch.device("cpu")).model.state_dict()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    taken = warm_start(state, keep(other, tmp_path))
    assert (taken.num_taken, taken.left) == (len(other), ())
    assert any(not torch.equal(before[name], other[name]) for name in other)
    for module in (state.model, state.average.module):
        assert all(torch.equal(value, other[name]) for name, value in module.state_dict().items())


def test_tensors_that_do_not_fit_stay_and_are_named(state: TrainingState, tmp_path: Path) -> None:
    own = {name: value.clone() for name, value in state.model.state_dict().items()}
    given = {name: torch.full_like(value, 3) for name, value in own.items()}
    changed = "head.class_predictors.0.weight"
    given[changed] = torch.zeros(80, *given[changed].shape[1:])
    gone = "head.class_predictors.0.bias"
    del given[gone]
    given["unknown.weight"] = torch.zeros(2)
    taken = warm_start(state, keep(given, tmp_path))
    assert taken.left == tuple(sorted((changed, gone)))
    assert taken.num_taken == len(own) - 2
    after = state.model.state_dict()
    assert all(torch.equal(after[name], own[name]) for name in taken.left)
    assert all(bool((after[name] == 3).all()) for name in own.keys() - set(taken.left))


def test_weights_of_nothing_in_common_and_other_bytes_are_refused(state: TrainingState, tmp_path: Path) -> None:
    with pytest.raises(UnfitWeights, match="no tensor of"):
        warm_start(state, keep({"foreign": torch.zeros(2)}, tmp_path))
    path = keep({"foreign": torch.ones(2)}, tmp_path)
    with path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UnfitWeights, match="differs from the sha256"):
        warm_start(state, path)


def test_frozen_parts_keep_weights_and_statistics_and_the_rest_learns(tiny_spec: Callable[..., RunSpec]) -> None:
    spec = tiny_spec(freeze=("backbone", "neck.top_down"), warm_start=SOME)
    state = build_state(spec, torch.device("cpu"))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    set_training_mode(state.model, spec)
    torch.manual_seed(0)
    predictions = state.model(torch.rand(2, 3, 64, 64) * 255)
    (predictions.boxes_raw.square().sum() + predictions.objectness_logits.sum()).backward()
    state.optimizer.step()
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(("backbone.", "neck.top_down.")) for name in changed)
    assert any(name.endswith("running_mean") for name in changed)


@pytest.mark.parametrize(("name", "near"), [("backbon", "backbone"), ("", "backbone, neck, head"), ("xyz", "backbone")])
def test_a_part_that_is_not_there_is_named(tiny_spec: Callable[..., RunSpec], name: str, near: str) -> None:
    with pytest.raises(BadFreeze, match=rf"training.freeze: '{name}' is no part .* there is {near}"):
        build_state(tiny_spec(freeze=(name,), warm_start=SOME), torch.device("cpu"))


def test_freezing_everything_is_refused(tiny_spec: Callable[..., RunSpec]) -> None:
    require_parts(tiny_spec(freeze=("backbone", "neck"), warm_start=SOME))
    with pytest.raises(BadFreeze, match="leaves nothing to train"):
        require_parts(tiny_spec(freeze=("backbone", "neck", "head"), warm_start=SOME))


def test_what_was_never_trained_is_not_frozen(tiny_spec: Callable[..., RunSpec]) -> None:
    with pytest.raises(BadFreeze, match=r"needs weights to keep; set training\.warm_start"):
        require_parts(tiny_spec(freeze=("backbone",)))


def test_nothing_frozen_leaves_run_keys_as_they_were(tiny_spec: Callable[..., RunSpec]) -> None:
    spec = tiny_spec()
    assert "freeze" not in spec.model_dump_json()
    warm = tiny_spec(warm_start=SOME)
    assert tiny_spec(freeze=("head",), warm_start=SOME).run_key != warm.run_key

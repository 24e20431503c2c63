"""What training remembers between steps, and how it is put away and taken up again."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import models
from models.interface import Detector
from models.weights import sources
from training.checkpoint import Manifest, file_sha256, load_checkpoint, save_checkpoint
from training.optimizer import build_optimizer, weight_average
from training.spec import RunSpec


class UnfitWeights(ValueError):
    """Weights that a run was to start from and that have nothing for it."""


class BadFreeze(ValueError):
    """`training.freeze` names no module of the architecture, or all of them, or what was never trained."""


@dataclass
class TrainingState:
    """All that a checkpoint holds. `step` counts optimiser steps, `epoch` finished epochs, and `steps_in_epoch` the
    steps since the last of these, of which `so_far` has the sums that the epoch's metrics are made of.

    `best`: where a run may end early, the weight average of the epoch with the highest val coco/AP, `best_ap`, after
    `best_epoch`. `skipped_in_a_row` counts the latest steps without a finite loss; it starts anew with the process.
    """

    model: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    epoch: int = 0
    steps_in_epoch: int = 0
    so_far: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_ap: float = -1.0
    best_epoch: int = 0
    skipped_in_a_row: int = 0

    @property
    def detector(self) -> Detector:
        """The model as what it is for: criterion and postprocess."""
        return cast(Detector, self.model)


def build_model(spec: RunSpec) -> nn.Module:
    """The spec's detector, freshly initialised, in channels-last memory order."""
    num_classes = len(spec.dataset.card.classes)
    detector = models.build(spec.architecture.name, num_classes=num_classes, **spec.architecture.settings)
    return cast(nn.Module, detector).to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def build_trainable(spec: RunSpec, device: torch.device) -> nn.Module:
    """The same on `device`, with what the spec freezes frozen. Raises BadFreeze."""
    model = build_model(spec).to(device)
    for part in parts(model, spec.training.freeze):
        part.requires_grad_(False)
    return model


def build_state(spec: RunSpec, device: torch.device) -> TrainingState:
    """Freshly initialised model, average and optimiser on `device`. Raises BadFreeze."""
    model = build_trainable(spec, device)
    return TrainingState(model, weight_average(model, spec.training), build_optimizer(model, spec.training))


def parts(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of those names. Raises BadFreeze if there is none."""
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            children = [child for child, _ in model.named_children()]
            near = difflib.get_close_matches(name, list(known)[1:], n=1) or children
            raise BadFreeze(f"training.freeze: {name!r} is no part of this architecture; there is {', '.join(near)}")
    return [known[name] for name in names]


def require_parts(spec: RunSpec) -> None:
    """Raise BadFreeze if the spec freezes what its architecture has not, all that it has, or no weights to keep."""
    if spec.training.freeze:
        if spec.training.warm_start is None:
            raise BadFreeze(
                f"training.freeze={list(spec.training.freeze)} needs weights to keep; set training.warm_start"
            )
        with torch.device("meta"):
            model = build_model(spec)
        frozen = {id(p) for part in parts(model, spec.training.freeze) for p in part.parameters()}
        if all(id(parameter) in frozen for parameter in model.parameters()):
            raise BadFreeze(f"training.freeze={list(spec.training.freeze)} leaves nothing to train; freeze less")


def set_training_mode(model: nn.Module, spec: RunSpec) -> None:
    """Training mode, but for what is frozen: its normalisation must not drift under weights that stay."""
    model.train()
    for part in parts(model, spec.training.freeze):
        part.eval()


@torch.no_grad()
def recover_statistics(state: TrainingState) -> None:
    """Running statistics that a skipped forward pass has made not finite become those of the average, which saw none.

    Nothing else would ever make them finite again.
    """
    for value, averaged in zip(state.model.buffers(), state.average.module.buffers(), strict=True):
        if not torch.isfinite(value).all():
            value.copy_(averaged)


@dataclass(frozen=True)
class WarmStart:
    """How many tensors of the model were taken from other weights, and the names of those that were not."""

    num_taken: int
    left: tuple[str, ...]


def warm_start_path(storage: Path, weights: str) -> Path:
    """Where weights named `sha256:<hex>` lie in storage."""
    return storage.parent / "warm_starts" / f"{weights.removeprefix('sha256:')}.safetensors"


class Fit(NamedTuple):
    """The share of an architecture's numbers that weights have, 0..1, and the frozen weights that they lack."""

    share: float
    frozen_without: tuple[str, ...]


def fit(spec: RunSpec, path: Path) -> Fit:
    """How well the tensors of a safetensors file fit a spec's architecture; see `models.weights`."""
    from safetensors import safe_open

    with torch.device("meta"):
        model = build_model(spec)
    wanted: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with safe_open(path, framework="pt") as given:
        fitting = sources(wanted, {name: tuple(given.get_slice(name).get_shape()) for name in given.keys()})  # noqa: SIM118
    total: int = sum(math.prod(shape) for shape in wanted.values())
    frozen = {id(p) for part in parts(model, spec.training.freeze) for p in part.parameters()}
    without = [name for name, p in model.named_parameters() if id(p) in frozen and name not in fitting]
    return Fit(sum(math.prod(wanted[name]) for name in fitting) / total, tuple(without))


def warm_start(state: TrainingState, path: Path) -> WarmStart:
    """Begin with the weights in a safetensors file; tensors for which it has no counterpart stay as initialised.

    Raises:
        UnfitWeights: the file's bytes are not those of its name, or no tensor fits.
    """
    from safetensors.torch import load_file

    if file_sha256(path) != path.stem:
        raise UnfitWeights(f"{path} differs from the sha256 in its name; delete it and plan again")
    known, given = state.model.state_dict(), load_file(path)
    shapes, given_shapes = ({name: tuple(value.shape) for name, value in one.items()} for one in (known, given))
    fitting = {name: given[source] for name, source in sources(shapes, given_shapes).items()}
    if not any(value.is_floating_point() for value in fitting.values()):
        raise UnfitWeights(
            f"no tensor of {path} has the name and shape of one in this architecture; use its own weights"
        )
    state.model.load_state_dict(fitting, strict=False)
    state.average.module.load_state_dict(state.model.state_dict())
    return WarmStart(len(fitting), tuple(sorted(known.keys() - fitting.keys())))


def save(spec: RunSpec, state: TrainingState, folder: Path, report: Mapping[str, float] | None = None) -> Manifest:
    """Write a checkpoint of `state` to `folder`, with the report that it was made for."""
    optimizer = state.optimizer.state_dict()
    tensors = {
        "model": state.model.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": {
            f"{index}.{name}": torch.as_tensor(value)
            for index, slots in optimizer["state"].items()
            for name, value in slots.items()
            if value is not None
        },
        "random": {"torch": torch.get_rng_state()},
        "best": state.best,
    }
    description = {
        "spec": spec.model_dump(mode="json"), "step": state.step, "epoch": state.epoch,
        "steps_in_epoch": state.steps_in_epoch, "so_far": state.so_far,
        "best_ap": state.best_ap, "best_epoch": state.best_epoch,
        "param_groups": optimizer["param_groups"], "report": dict(report or {}),
    }  # fmt: skip
    return save_checkpoint(
        folder,
        run_key=spec.run_key,
        step=state.step,
        epoch=state.epoch,
        tensors=tensors,
        state=description,
        score=(report or {}).get("val/coco/AP"),
    )


def restore(state: TrainingState, folder: Path) -> None:
    """Load a verified checkpoint into `state`."""
    tensors, description = load_checkpoint(folder, ("model", "average", "optimizer", "random", "best"))
    state.model.load_state_dict(tensors["model"])
    state.average.load_state_dict(tensors["average"])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors["optimizer"].items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    state.optimizer.load_state_dict({"state": slots, "param_groups": description["param_groups"]})
    # Fused optimisers walk through memory: what they keep of a weight has to lie there in the order of the weight.
    for weight, kept in state.optimizer.state.items():
        for name, value in kept.items():
            if value.shape == weight.shape:
                kept[name] = torch.empty_like(weight).copy_(value)
    torch.set_rng_state(tensors["random"]["torch"])
    state.step, state.epoch = description["step"], description["epoch"]
    state.steps_in_epoch, state.so_far = description["steps_in_epoch"], description["so_far"]
    device = next(state.model.parameters()).device
    state.best = {name: value.to(device) for name, value in tensors["best"].items()}
    state.best_ap, state.best_epoch = description["best_ap"], description["best_epoch"]

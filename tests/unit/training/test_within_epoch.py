"""What happens between two epochs' ends: checkpoints, requests, and ends before the last epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.checkpoint import verify_checkpoint
from training.errors import Preempted, Stopped
from training.loop import Hooks, train
from training.requests import Asked
from training.spec import ComputeSpec, RunSpec
from training.state import TrainingState, build_state, restore
from training.workers import Workers

pytestmark = pytest.mark.slow

MakeSpec = Callable[..., RunSpec]
ALONE = Workers(0, 1, torch.device("cpu"))
CHECKPOINT = Asked(checkpoint=True)


class Asking:
    """Hooks that ask for something at given steps, counted from the start of the process, and keep what is answered."""

    def __init__(self, folder: Path, answers: dict[int, Asked]) -> None:
        self.folder, self.answers = folder, answers
        self.step = 0
        self.kept: list[tuple[int, int, bool]] = []
        self.settled_after: list[int] = []
        self.reports: list[tuple[int, int, dict[str, float]]] = []

    def hooks(self) -> Hooks:
        return Hooks(self.report, checkpoint=self.checkpoint, settle=self.settle, asked=self.asked)

    def asked(self) -> Asked:
        self.step += 1
        return self.answers.get(self.step, Asked())

    def checkpoint(self, step: int, epoch: int, save: Callable[..., object], is_ending: bool) -> None:
        self.kept.append((step, epoch, is_ending))
        save(self.folder / f"within-{step}")

    def settle(self) -> None:
        self.settled_after.append(len(self.kept))

    def report(self, metrics: dict[str, float], step: int, epoch: int, save: Callable[..., object]) -> None:
        self.reports.append((step, epoch, metrics))
        save(self.folder / f"after-{epoch}", metrics)


def tensors(state: TrainingState) -> dict[str, Tensor]:
    content = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    content |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        content |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    return content


def differing(one: TrainingState, two: TrainingState) -> list[str]:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(("train/", "val/")) and not name.endswith("per_s")
    }


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw", "learning_rate": 0.002, "precision": "bf16", "loader_processes": 1}]
)
def test_a_run_resumed_within_an_epoch_equals_one_that_was_never_stopped(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Bit for bit: weights, average, momentum, and the metrics of the epoch that was interrupted."""
    compute = ComputeSpec(workers=1, loader_processes=changes.pop("loader_processes", 0))
    spec = tiny_spec(epochs=3, compute=compute, **changes)
    whole, rest = Asking(tmp_path, {8: CHECKPOINT}), Asking(tmp_path / "rest", {})
    uninterrupted, one = train(spec, tiny.folder, ALONE, whole.hooks())
    assert whole.kept == [(8, 1, False)]
    manifest = verify_checkpoint(tmp_path / "within-8")
    assert (manifest.step, manifest.epoch, manifest.score) == (8, 1, None)
    torch.manual_seed(999)
    resumed, two = train(spec, tiny.folder, ALONE, rest.hooks(), tmp_path / "within-8")
    assert rest.step == 4 + 6, "two of the second epoch's six steps were done already"
    assert differing(uninterrupted, resumed) == []
    assert [report[:2] for report in rest.reports] == [(12, 2), (18, 3)]
    for (_, _, before), (_, _, after) in zip(whole.reports[1:], rest.reports, strict=True):
        assert comparable(before) == comparable(after)
    assert one is not None
    assert two is not None
    assert one.detections == two.detections


def test_the_last_step_of_an_epoch_needs_no_checkpoint_of_its_own(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    asking = Asking(tmp_path, {6: CHECKPOINT, 7: CHECKPOINT})
    train(tiny_spec(epochs=2), tiny.folder, ALONE, asking.hooks())
    assert asking.kept == [(7, 1, False)]


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize(("asked", "ends"), [(Asked(leave=True), Preempted), (Asked(stop=True), Stopped)])
def test_who_has_to_end_keeps_what_was_reached(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, step: int, asked: Asked, ends: type[Exception]
) -> None:
    """Also at the end of an epoch, whose validation is then still to do."""
    spec = tiny_spec(epochs=2)
    asking, rest = Asking(tmp_path, {step: asked}), Asking(tmp_path / "rest", {})
    with pytest.raises(ends, match=f"step {step}"):
        train(spec, tiny.folder, ALONE, asking.hooks())
    assert (asking.kept, asking.reports) == ([(step, 0, True)], [])
    assert asking.settled_after == [1]
    train(spec, tiny.folder, ALONE, rest.hooks(), tmp_path / f"within-{step}")
    assert rest.step == 12 - step
    assert [report[:2] for report in rest.reports] == [(6, 1), (12, 2)]


def test_weights_that_are_not_finite_are_not_kept_within_an_epoch_either(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Asking(tmp_path, {3: CHECKPOINT})

    def poison(model: nn.Module, spec: RunSpec) -> None:
        model.train()
        next(model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr("training.loop.set_training_mode", poison)
    with pytest.raises(RuntimeError, match="not finite in epoch 1"):
        train(tiny_spec(epochs=1, closing_epochs=0), tiny.folder, ALONE, asking.hooks())
    assert asking.kept == []


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Validation within a run gives these, one after the other."""
    given: list[float] = []
    monkeypatch.setattr("training.loop.validate", lambda *_, **__: {"coco/AP": given.pop(0)})
    return given


def test_a_run_without_progress_ends_with_the_best_weights(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, scores: list[float]
) -> None:
    spec = tiny_spec(epochs=9, closing_epochs=0, batch_size=12, patience_epochs=2)
    scores += [0.1, 0.3, 0.2, 0.3, 0.9]
    asking, rest = Asking(tmp_path, {}), Asking(tmp_path / "rest", {})
    state, validation = train(spec, tiny.folder, ALONE, asking.hooks())
    assert [epoch for _, epoch, _ in asking.reports] == [1, 2, 3, 4], "as good as the best is no progress"
    assert (state.best_epoch, state.best_ap, scores) == (2, 0.3, [0.9])
    assert [verify_checkpoint(tmp_path / f"after-{epoch}").score for epoch in (1, 2, 3, 4)] == [0.1, 0.3, 0.2, 0.3]
    # What is kept is what the second epoch's checkpoint holds.
    then, _ = train(spec.model_copy(update={"compute": ComputeSpec(workers=1)}), tiny.folder, ALONE, rest.hooks(),
                    tmp_path / "after-4")  # fmt: skip
    assert (rest.step, rest.reports) == (0, []), "a run that ended stays ended"
    second = build_state(spec, ALONE.device)
    restore(second, tmp_path / "after-2")
    for found in (state, then):
        kept, best = found.average.module.state_dict(), second.average.module.state_dict()
        assert [name for name in kept if not torch.equal(kept[name], best[name])] == []
    assert validation is not None


def test_patience_survives_a_restart(tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, scores: list[float]) -> None:
    spec = tiny_spec(epochs=9, closing_epochs=0, batch_size=12, patience_epochs=2)
    scores += [0.3, 0.2, 0.25]
    asking, rest = Asking(tmp_path, {5: Asked(stop=True)}), Asking(tmp_path / "rest", {})
    with pytest.raises(Stopped):
        train(spec, tiny.folder, ALONE, asking.hooks())
    state, _ = train(spec, tiny.folder, ALONE, rest.hooks(), tmp_path / "within-5")
    assert [epoch for _, epoch, _ in rest.reports] == [3]
    assert (state.best_epoch, state.best_ap) == (1, 0.3)


def test_a_gradient_longer_than_the_limit_is_shortened_to_it(tiny: Any, tiny_spec: MakeSpec, tmp_path: Path) -> None:
    """Plain SGD on one step: the weights move by the learning rate times the limit."""
    rate, limit = 0.5, 0.01
    spec = tiny_spec(
        epochs=1, closing_epochs=0, batch_size=24, warmup_epochs=0, learning_rate=rate, momentum=0, weight_decay=0,
        clip_norm=limit,
    )  # fmt: skip
    before = Asking(tmp_path, {})
    moved: dict[str, float] = {}

    torch.manual_seed(spec.seed)
    initial = {name: value.clone() for name, value in build_state(spec, ALONE.device).model.named_parameters()}
    state, _ = train(spec, tiny.folder, ALONE, before.hooks())
    for name, value in state.model.named_parameters():
        moved[name] = float((value.detach() - initial[name].detach()).square().sum())
    assert before.reports[0][2]["train/gradient_norm"] > 100 * limit
    assert sum(moved.values()) ** 0.5 == pytest.approx(rate * limit, rel=1e-3)


def test_the_parts_of_a_step_add_up_to_the_time_of_an_epoch(tiny: Any, tiny_spec: MakeSpec, tmp_path: Path) -> None:
    asking = Asking(tmp_path, {})
    train(tiny_spec(epochs=1, closing_epochs=0), tiny.folder, ALONE, asking.hooks())
    shares = {name: value for name, value in asking.reports[0][2].items() if name.startswith("share/")}
    assert set(shares) == {
        f"share/{part}"
        for part in ("data_wait", "transfer", "forward", "assignment", "backward", "all_reduce", "optimizer", "report")
    }
    assert all(value >= 0 for value in shares.values())
    assert 0.9 < sum(shares.values()) <= 1.001
    assert max(shares, key=lambda name: shares[name]) in {"share/forward", "share/backward", "share/data_wait"}

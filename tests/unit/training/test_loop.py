from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.augment import AugmentConfig
from data.batch import Batch, collate
from data.decode import TooManyUnreadable, UndecodableImage
from data.loader import DetectionDataset
from models.interface import Losses
from training.checkpoint import verify_checkpoint
from training.errors import Diverged
from training.feeding import to_device
from training.loop import MAX_NON_FINITE_STEPS, Hooks, count_unreadable, train, train_one_epoch
from training.meter import Progress
from training.spec import ComputeSpec, RunSpec
from training.state import TrainingState, build_state
from training.workers import Workers

MakeSpec = Callable[..., RunSpec]
ALONE = Workers(0, 1, torch.device("cpu"))
PLAIN = AugmentConfig(mosaic_probability=0, hue_gain=0, saturation_gain=0, value_gain=0)


class Reports:
    """Hooks that keep every report and progress, and write the checkpoints of `epochs` to `folder`."""

    def __init__(self, folder: Path | None = None, epochs: tuple[int, ...] = ()) -> None:
        self.folder, self.epochs = folder, epochs
        self.metrics: list[dict[str, float]] = []
        self.steps: list[tuple[int, int]] = []
        self.progress: list[Progress] = []

    def hooks(self) -> Hooks:
        return Hooks(self.report, progress=self.progress.append)

    def report(self, metrics: dict[str, float], step: int, epoch: int, save: Callable[[Path], object]) -> None:
        self.metrics.append(metrics)
        self.steps.append((step, epoch))
        if self.folder is not None and epoch in self.epochs:
            save(self.folder / f"checkpoint_{epoch}")


def everything(state: TrainingState) -> dict[str, Tensor]:
    """Every tensor that training remembers, cloned."""
    content = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    content |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        content |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    return {name: value.clone() for name, value in content.items()}


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def test_the_loss_falls_and_every_epoch_is_reported(tiny: Any, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(epochs=6, closing_epochs=0, learning_rate=0.1, augment=PLAIN, validate_every_epochs=4)
    reports = Reports()
    state, validation = train(spec, tiny.folder, ALONE, reports.hooks())
    losses = [metrics["train/loss"] for metrics in reports.metrics]
    assert losses[-1] < 0.9 * losses[0]
    assert reports.steps == [(6 * epoch, epoch) for epoch in range(1, 7)]
    assert (state.step, state.epoch) == (36, 6)
    assert [any(name.startswith("val/") for name in metrics) for metrics in reports.metrics] == [
        epoch in {4, 6} for epoch in range(1, 7)
    ]
    for metrics in reports.metrics:
        terms = [value for name, value in metrics.items() if name.startswith("train/loss_")]
        assert metrics["train/loss"] == pytest.approx(sum(terms))
        assert metrics["train/non_finite_steps"] == 0
    assert [(news.epoch, news.step, news.steps) for news in reports.progress][-1] == (6, 36, 36)
    assert validation is not None
    assert validation.result.metrics["coco/AP"] == reports.metrics[-1]["val/coco/AP"]


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "learning_rate": 0.002, "precision": "bf16"}])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Bit for bit: weights, average, momentum, and what was reported."""
    spec = tiny_spec(epochs=3, batch_size=8, **changes)
    whole, rest = Reports(tmp_path, (1,)), Reports()
    uninterrupted, one = train(spec, tiny.folder, ALONE, whole.hooks())
    assert verify_checkpoint(tmp_path / "checkpoint_1").epoch == 1
    torch.manual_seed(999)
    resumed, two = train(spec, tiny.folder, ALONE, rest.hooks(), tmp_path / "checkpoint_1")
    assert differing(everything(uninterrupted), everything(resumed)) == []
    assert rest.steps == whole.steps[1:] == [(6, 2), (9, 3)]
    for before, after in zip(whole.metrics[1:], rest.metrics, strict=True):
        assert {k: v for k, v in before.items() if k[:5] in {"train", "val/c"} and "images_per_s" not in k} == {
            k: v for k, v in after.items() if k[:5] in {"train", "val/c"} and "images_per_s" not in k
        }
    assert one is not None
    assert two is not None
    assert one.detections == two.detections


@pytest.fixture
def damaged(tiny: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of `tiny` in which the first image of a split is cut short, and returns that image."""

    def damage(split: str) -> Path:
        path = shutil.copytree(tiny.folder, tmp_path / "damaged") / "images" / f"{split}-000.png"
        path.write_bytes(path.read_bytes()[:-300])
        return path

    return damage


def test_an_unreadable_image_is_counted_and_named_in_every_epoch(
    damaged: Callable[[str], Path], tiny_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.loader.MAX_UNREADABLE_SHARE", 0.1)
    path, reports, named = damaged("train"), Reports(), []
    hooks = replace(reports.hooks(), skipped=named.append)
    train(tiny_spec(batch_size=8, epochs=2), path.parents[1], ALONE, hooks)
    assert [metrics["train/images_skipped"] for metrics in reports.metrics] == [1, 1]
    assert named == [[path], [path]]


def test_ranks_count_together_what_they_could_not_read(
    tiny: Any, tiny_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 24 on one rank, and one of these and another one on the second."""

    class Two(Workers):
        def sum(self, values: Tensor) -> Tensor:
            return values + torch.tensor([1, 0, 1] + [0] * 21, dtype=values.dtype)

    dataset = DetectionDataset(tiny.folder, "train", input_size_px=64, augment=PLAIN, seed=0)
    dataset.unreadable[2] = dataset.unreadable[5] = True
    monkeypatch.setattr("data.loader.MAX_UNREADABLE_SHARE", 3 / 24)
    found = count_unreadable(dataset, Two(0, 2, torch.device("cpu")))
    assert [path.name for path in found] == ["train-000.png", "train-002.png", "train-005.png"]
    monkeypatch.setattr("data.loader.MAX_UNREADABLE_SHARE", 2 / 24)
    with pytest.raises(TooManyUnreadable, match="3 of 24"):
        count_unreadable(dataset, Two(0, 2, torch.device("cpu")))


def test_one_unreadable_image_of_few_stops_the_run(damaged: Callable[[str], Path], tiny_spec: MakeSpec) -> None:
    path, reports = damaged("train"), Reports()
    with pytest.raises(TooManyUnreadable, match=r"1 of 24 .*train-000\.png"):
        train(tiny_spec(batch_size=8), path.parents[1], ALONE, reports.hooks())
    assert reports.metrics == []


def test_an_unreadable_validation_image_stops_scoring(
    damaged: Callable[[str], Path], tiny_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.loader.MAX_UNREADABLE_SHARE", 1.0)
    path, reports = damaged("val"), Reports()
    with pytest.raises(UndecodableImage, match=r"val-000\.png: truncated"):
        train(tiny_spec(batch_size=8), path.parents[1], ALONE, reports.hooks())


def test_rare_classes_and_a_picture_cache_change_the_epoch_as_asked(
    tiny: Any, tiny_spec: MakeSpec, tmp_path: Path
) -> None:
    """More steps, and two files of pictures, from which a second run learns the same."""
    spec = tiny_spec(batch_size=4, repeat_threshold=1, epochs=1, compute=ComputeSpec(workers=1, cache_gib=0))
    one, two = Reports(), Reports()
    train(spec, tiny.folder, ALONE, one.hooks(), cache_folder=tmp_path)
    assert one.steps[0][0] > 24 // 4
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["train", "val"]
    train(spec, tiny.folder, ALONE, two.hooks(), cache_folder=tmp_path)
    assert one.metrics[0]["train/loss"] == two.metrics[0]["train/loss"]
    assert one.metrics[0]["train/images_skipped"] == 0


def test_a_finished_run_is_only_scored_again(tiny: Any, tiny_spec: MakeSpec, tmp_path: Path) -> None:
    spec = tiny_spec(epochs=1, batch_size=8)
    reports, nothing = Reports(tmp_path, (1,)), Reports()
    state, one = train(spec, tiny.folder, ALONE, reports.hooks())
    again, two = train(spec, tiny.folder, ALONE, nothing.hooks(), tmp_path / "checkpoint_1")
    assert nothing.steps == []
    assert differing(everything(state), everything(again)) == []
    assert one is not None
    assert two is not None
    assert one.result == two.result


def test_another_seed_gives_another_run(tiny: Any, tiny_spec: MakeSpec) -> None:
    first = []
    for seed in (0, 1):
        reports = Reports()
        train(tiny_spec(epochs=1, closing_epochs=0, batch_size=24, seed=seed), tiny.folder, ALONE, reports.hooks())
        first.append(reports.metrics[0]["train/loss"])
    assert first[0] != first[1]


@pytest.fixture
def small(tiny: Any, tiny_spec: MakeSpec) -> tuple[RunSpec, TrainingState, DataLoader[Any]]:
    """An untrained state and two batches of four."""
    spec = tiny_spec(batch_size=4, warmup_epochs=0, closing_epochs=0, epochs=50)
    dataset = DetectionDataset(tiny.folder, "val", input_size_px=64, augment=None, seed=0)
    torch.manual_seed(0)
    return spec, build_state(spec, ALONE.device), DataLoader(dataset, batch_size=4, collate_fn=collate)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    small: tuple[RunSpec, TrainingState, DataLoader[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, state, loader = small
    criterion, seen = state.detector.criterion, []

    def second_is_nan(*arguments: Any, **options: Any) -> Losses:
        seen.append(everything(state))
        losses = criterion(*arguments, **options)
        sums = {name: value * (float("nan") if len(seen) == 2 else 1) for name, value in losses.sums.items()}
        return Losses(sums, losses.counts, losses.metrics)

    monkeypatch.setattr(state.model, "criterion", second_is_nan, raising=False)
    metrics = train_one_epoch(spec, state, state.model, loader, ALONE, Reports().hooks(), closing=False)
    assert len(seen) == state.step == 2
    assert metrics["train/non_finite_steps"] == 1
    assert all(math.isfinite(value) for value in metrics.values())
    # The forward pass of the second step has moved the running statistics by then.
    trained = {f"model.{name}" for name, _ in state.model.named_parameters()}
    after_first, after_second = seen[1], everything(state)
    assert differing(after_first, after_second) == []
    assert trained & {name for name in trained if not torch.equal(seen[0][name], after_first[name])}


def test_a_forward_pass_that_is_not_finite_leaves_no_trace(
    tiny: Any, tiny_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the running statistics either, which would stay so and end the run with the epoch."""
    spec, reports, num_batches = tiny_spec(epochs=1, closing_epochs=0), Reports(), count(1)

    def second_is_nan(batch: Batch, device: torch.device) -> tuple[Any, Any]:
        images, targets = to_device(batch, device)
        return images * (float("nan") if next(num_batches) == 2 else 1), targets

    monkeypatch.setattr("training.loop.to_device", second_is_nan)
    train(spec, tiny.folder, ALONE, reports.hooks())
    assert [metrics["train/non_finite_steps"] for metrics in reports.metrics] == [1]


def test_a_run_that_diverges_says_so_and_keeps_finite_weights(
    small: tuple[RunSpec, TrainingState, DataLoader[Any]],
) -> None:
    """A learning rate of 1e10 makes every loss after the first infinite; the count runs on across epochs."""
    spec, state, loader = small
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"learning_rate": 1e10})})

    settled: list[int] = []
    hooks = replace(Reports().hooks(), settle=lambda: settled.append(state.step))

    def one_epoch() -> None:
        train_one_epoch(spec, state, state.model, loader, ALONE, hooks, closing=False)

    for _ in range(MAX_NON_FINITE_STEPS // len(loader)):
        one_epoch()
    with pytest.raises(Diverged, match=r"lower training\.learning_rate"):
        one_epoch()
    assert state.step == MAX_NON_FINITE_STEPS + 1
    assert settled == [state.step]
    for name, parameter in state.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    for name, value in state.average.state_dict().items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("steps", ["first", "all"])
def test_what_a_divergence_leaves_behind_is_not_kept(
    tiny: Any, tiny_spec: MakeSpec, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the weights after a step with a finite loss; an epoch of less than 20 steps, all of them skipped."""
    spec = tiny_spec(epochs=2, closing_epochs=0, augment=PLAIN)
    reports, settled = Reports(), list[int]()
    build = build_state

    def poisoned(*arguments: Any) -> TrainingState:
        state = build(*arguments)
        criterion = state.detector.criterion

        def broken(*inputs: Any, **options: Any) -> Losses:
            losses = criterion(*inputs, **options)
            if steps == "first":
                next(state.model.parameters()).data.fill_(float("nan"))
                return losses
            return Losses({name: value * float("inf") for name, value in losses.sums.items()}, losses.counts, {})

        monkeypatch.setattr(state.model, "criterion", broken, raising=False)
        return state

    monkeypatch.setattr("training.loop.build_state", poisoned)
    with pytest.raises(Diverged, match=r"not finite in epoch 1; lower training\.learning_rate"):
        train(spec, tiny.folder, ALONE, replace(reports.hooks(), settle=lambda: settled.append(1)))
    assert reports.metrics == []
    assert settled == [1]

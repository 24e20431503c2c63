"""The training loop on a GPU, in bf16, eager and compiled, and from a checkpoint within an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.loop import Hooks, train
from training.requests import Asked
from training.spec import RunSpec
from training.workers import Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_learns_says_where_its_time_goes_and_goes_on_within_an_epoch(
    tiny: Any, tiny_spec: Callable[..., RunSpec], tmp_path: Path, compiled: bool
) -> None:
    spec = tiny_spec(epochs=3, precision="bf16", learning_rate=0.1, compile=compiled, accumulation=1)
    reports: list[dict[str, float]] = []
    step = 0

    def asked() -> Asked:
        nonlocal step
        step += 1
        return Asked(checkpoint=step == 8)

    hooks = Hooks(
        lambda metrics, *_: reports.append(metrics),
        checkpoint=lambda _step, _epoch, save, _: save(tmp_path / "within"),
        asked=asked,
    )
    workers = Workers(0, 1, torch.device("cuda", 0))
    train(spec, tiny.folder, workers, hooks)
    assert reports[-1]["train/loss"] < reports[0]["train/loss"]
    shares = {name: value for name, value in reports[-1].items() if name.startswith("share/")}
    assert all(value >= 0 for value in shares.values())
    assert shares["share/forward"] > 0
    assert shares["share/backward"] > 0
    again: list[dict[str, float]] = []
    state, _ = train(spec, tiny.folder, workers, Hooks(lambda metrics, *_: again.append(metrics)), tmp_path / "within")
    assert (state.step, len(again)) == (18, 2)
    # Sums on a GPU are in no fixed order.
    assert again[0]["train/loss"] == pytest.approx(reports[1]["train/loss"], rel=0.05)

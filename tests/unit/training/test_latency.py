"""Latency against a clock that the test winds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import training.latency
from data.tiling import TileGrid
from evaluation.result import ScoreOptions
from training.latency import Latency, NothingToTime, interleaved_p95_ms, measure_latency
from training.scoring import split_inputs
from training.spec import RunSpec, ScoringSpec
from training.state import build_model

MakeSpec = Callable[..., RunSpec]
CPU = torch.device("cpu")


@pytest.fixture
def tick_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every look at the clock takes this long; what lies between takes no time."""
    step, now = [0.001], [0.0]

    def perf_counter() -> float:
        now[0] += step[0]
        return now[0]

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    return step


def measured(spec: RunSpec, tiny: Any, split: Any = "train") -> Latency:
    return measure_latency(spec, build_model(spec), split_inputs(spec, tiny.folder, split), CPU)


def test_times_are_per_input_and_throughput_counts_whole_batches(
    tiny: Any, tiny_spec: MakeSpec, tick_s: list[float]
) -> None:
    found = measured(tiny_spec(), tiny)
    assert (found.p50_ms, found.p95_ms) == (pytest.approx(1), pytest.approx(1))
    assert (found.num_timed, found.batch_size, found.inputs_per_image) == (24, 8, 1)
    assert found.inputs_per_s == pytest.approx(8 / 0.001)
    # Three batches, each with three looks at the clock, and one at the end.
    assert found.end_to_end_inputs_per_s == pytest.approx(24 / 0.010)
    assert (found.device, found.threads, found.precision) == ("cpu", torch.get_num_threads(), "fp32")


def test_the_warm_up_is_not_timed_and_the_percentiles_are_those_of_the_rest(
    tiny: Any, tiny_spec: MakeSpec, tick_s: list[float]
) -> None:
    spec, num_looks = tiny_spec(), [0]
    model = build_model(spec)

    def slower_each_time(*_: Any) -> None:
        num_looks[0] += 1
        tick_s[0] = num_looks[0] / 1000

    model.register_forward_hook(slower_each_time)
    found = measure_latency(spec, model, split_inputs(spec, tiny.folder, "train"), CPU)
    # Ten single looks to warm up, 24 that take 11 to 34 ms, then two batches to warm up and three of 37 to 39 ms.
    assert num_looks == [10 + 24 + 2 + 3]
    assert found.p50_ms == pytest.approx((11 + 34) / 2)
    assert found.p95_ms == pytest.approx(11 + 0.95 * 23)
    assert found.inputs_per_s == pytest.approx(3 * 8 / (0.037 + 0.038 + 0.039))


def test_a_slow_model_is_timed_on_fewer_inputs(tiny: Any, tiny_spec: MakeSpec, tick_s: list[float]) -> None:
    tick_s[0] = 1.0
    found = measured(tiny_spec(), tiny)
    # Patience is looked at after each input, three ticks later than the last time.
    assert found.num_timed == training.latency.PATIENCE_S // 3 + 1
    assert found.p50_ms == pytest.approx(1000)


def test_tiles_are_inputs_and_few_inputs_are_a_batch(tiny: Any, tiny_spec: MakeSpec) -> None:
    grid = TileGrid(size_px=32, overlap_px=0)
    found = measured(tiny_spec(scoring=ScoringSpec(tiling=grid, flip=True)), tiny, "val")
    assert (found.num_timed, found.inputs_per_image) == (32, 4)
    assert found.p50_ms <= found.p95_ms
    assert 0 < found.end_to_end_inputs_per_s < found.inputs_per_s
    assert not {"latency", "threads", "device"} & ScoreOptions.model_fields.keys()


def test_nothing_to_time_is_an_error(tiny: Any, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec()
    with pytest.raises(NothingToTime, match="no image to time"):
        measure_latency(spec, build_model(spec), [], CPU)  # type: ignore[arg-type]


def test_two_models_take_turns_and_an_image_of_tiles_takes_as_long_as_all_of_them(
    tiny: Any, tiny_spec: MakeSpec, tick_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tiled = tiny_spec(), tiny_spec(scoring=ScoringSpec(tiling=TileGrid(size_px=32, overlap_px=0)))
    order: list[int] = []

    def look(detector: Any, *_: Any, **__: Any) -> None:
        order.append(models.index(detector))

    models = [build_model(whole), build_model(tiled)]
    monkeypatch.setattr(training.latency, "detect_batch", look)
    sides = [
        (spec, model, split_inputs(spec, tiny.folder, "test"))
        for spec, model in zip((whole, tiled), models, strict=True)
    ]
    assert interleaved_p95_ms(sides, CPU) == [pytest.approx(1), pytest.approx(4)]
    warm_up = 2 * training.latency.WARM_UP_INPUTS
    assert order[warm_up:] == [0, 1] * 8

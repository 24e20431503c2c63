"""A whole run on this process alone, with a trace of its steps and a record of what it held."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.artifacts import write_artifacts
from training.ledger import read_ledger
from training.records import read_journal, read_result, record_attempt
from training.run import run_attempt
from training.scoring import Scored, Split, score_split
from training.spec import ComputeSpec, RunSpec
from training.state import build_model
from training.store import FolderStore
from training.trace import NUM_STEPS, NUM_TRACED, TRACE, StepTrace
from training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
PROFILED = ComputeSpec(workers=1, cpus_per_worker=2, profile=True)


@pytest.fixture(scope="module")
def run_folder(tiny: Any, tiny_spec: Callable[..., RunSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run of two epochs of twelve steps."""
    folder = tmp_path_factory.mktemp("runs")
    spec = tiny_spec(batch_size=2, compute=PROFILED)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SPECK_STORE", str(folder / "store"))
        attempt = record_attempt(folder / spec.run_key, spec, data_source=tiny.source, code_hash="c")
        run_attempt(attempt, FolderStore(folder / spec.run_key), ALONE, accumulation=1)
    return folder / spec.run_key


def test_a_profiled_run_keeps_a_trace_of_a_few_steps(run_folder: Path) -> None:
    result = read_result(run_folder)
    assert result is not None
    assert f"artifacts/{TRACE}" in result.files
    with gzip.open(run_folder / "artifacts" / TRACE) as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == NUM_TRACED
    optimizer_steps = [name for name in names if name.startswith("Optimizer.step#")]
    assert len(optimizer_steps) == NUM_TRACED
    # Forward and backward.
    assert {"aten::convolution", "aten::convolution_backward"} <= set(names)


def test_a_dataset_may_take_longer_to_come_than_a_worker_may_hang(
    tiny: Any, tiny_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fetched(Exception):
        pass

    def fetching(*_: object) -> Path:
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
        raise Fetched

    monkeypatch.setattr("training.run.on_this_node", fetching)
    spec = tiny_spec(compute=PROFILED)
    attempt = record_attempt(tmp_path / spec.run_key, spec, data_source=tiny.source, code_hash="c")
    with pytest.raises(Fetched):
        run_attempt(attempt, FolderStore(tmp_path / spec.run_key), ALONE, accumulation=1)


def test_what_the_run_held_is_in_its_ledger(run_folder: Path) -> None:
    ledger, result = read_ledger(run_folder), read_result(run_folder)
    assert ledger is not None
    assert result is not None
    useful_s = sum(entry.seconds for entry in read_journal(run_folder)) + result.seconds["score_test"]
    assert (ledger.accelerator, ledger.total.num_starts, ledger.total.price) == ("CPU", 1, None)
    assert ledger.total.useful_s == pytest.approx(2 * useful_s)
    assert ledger.total.held_s > ledger.total.useful_s


def test_scoring_again_keeps_the_trace(run_folder: Path, tiny: Any, tmp_path: Path) -> None:
    result = read_result(run_folder)
    assert result is not None
    model = build_model(result.spec)
    scored: dict[Split, Scored] = {}
    for split in ("val", "test"):
        content = score_split(result.spec, model, tiny.folder, split, ALONE)
        assert content is not None
        scored[split] = content
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / TRACE).write_bytes(b"a trace")
    write_artifacts(result.spec, model.state_dict(), scored, {}, tiny.folder, tmp_path / "artifacts", [])
    assert (tmp_path / "artifacts" / TRACE).read_bytes() == b"a trace"


@pytest.mark.parametrize("steps_per_epoch", [NUM_STEPS, NUM_STEPS + 1])
def test_a_trace_lies_within_one_epoch(tmp_path: Path, steps_per_epoch: int) -> None:
    said: list[str] = []
    trace = StepTrace(tmp_path / TRACE, on_gpu=False, say=said.append)
    for _epoch in range(2):
        for step in range(steps_per_epoch):
            torch.ones(2) + step
            trace.stepped(steps_per_epoch - step - 1)
    trace.close()
    is_long_enough = steps_per_epoch > NUM_STEPS
    assert (tmp_path / TRACE).is_file() == is_long_enough
    assert said == ([] if is_long_enough else [f"no trace: no epoch had more than {NUM_STEPS} steps"])


def test_a_training_that_ends_early_leaves_the_profiler_stopped(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    for folder in ("file", "folder"):
        trace = StepTrace(tmp_path / folder / TRACE, on_gpu=False, say=said.append)
        for left in range(NUM_STEPS, 1, -1):
            trace.stepped(left)
        trace.close()
        trace.close()
    assert len(said) == 1
    assert said[0].startswith("no trace: ")

"""kill -9 of `speck train-all` at any moment, then the same command: the end is that of a run nobody disturbed."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos.pipeline import EXPERIMENT, Pipeline, make_pipeline
from chaos.processes import left_after
from mlflow import MlflowClient

from tracking.authority import open_authority
from training.records import RESULT, read_journal, read_result

NUM_KILLS = 10
RUNS_S = 600.0
ENDS_S = 30.0


def make(folder: Path) -> Pipeline:
    """Two cells of one dataset, so that the second may challenge the first."""
    pipeline = make_pipeline(folder)
    (pipeline.repo / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"seeds": [0, 1]}))
    return pipeline


def finish(pipeline: Pipeline) -> None:
    run = pipeline.start("train-all")
    try:
        assert run.wait(RUNS_S) == 0, run.output
    finally:
        run.kill()
        left = left_after(run.mark, ENDS_S)
    assert left == [], "processes that outlived a finished run"


def kill_after(pipeline: Pipeline, seconds: float, *, with_descendants: bool) -> str:
    """The last line that a run said which was killed after so long."""
    run = pipeline.start("train-all")
    time.sleep(seconds)
    run.kill(with_descendants=with_descendants)
    left = left_after(run.mark, ENDS_S)
    assert left == [], "processes that outlived a killed run"
    return run.lines[-1] if run.lines else "nothing yet"


def end_state(pipeline: Pipeline) -> dict[str, Any]:
    """What must not depend on how often it was begun: no times, and of MLflow's ids none."""
    client = MlflowClient(f"sqlite:///{pipeline.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sample-aerial").experiment_id
    runs = [run for run in client.search_runs([experiment]) if "speck.run_key" in run.data.tags]
    histories = {
        run.data.tags["speck.run_key"]: Counter(
            metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")
        )
        for run in runs
    }
    folders = sorted(path.parent for path in (pipeline.home / "runs").glob(f"*/{RESULT}"))
    results = {folder.name: read_result(folder) for folder in folders}
    model = client.get_registered_model("sample-aerial")
    keys = {version.version: version.tags["speck.run_key"] for version in client.search_model_versions()}
    return {
        "scores": {
            (key, split): {name: value for name, value in score.metrics.items() if name.startswith("coco/")}
            for key, result in results.items()
            if result is not None
            for split, score in result.scores.items()
        },
        "epochs": {folder.name: [entry.epoch for entry in read_journal(folder)] for folder in folders},
        "ledger": [
            (entry.action, entry.run_key, keys.get(str(entry.champion)), entry.looks_at_test)
            for entry in open_authority(None, pipeline.home).entries("sample-aerial")
        ],
        "runs": Counter((run.data.tags["speck.run_key"], run.info.status) for run in runs),
        "histories": histories,
        "versions": Counter(keys.values()),
        "aliases": {alias: keys[version] for alias, version in model.aliases.items()},
        "leases": [path.name for path in (pipeline.home / "leases").glob("*.json")],
    }


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_kills_at_random_moments_leave_the_end_of_an_undisturbed_run(tmp_path: Path) -> None:
    """Each in a home of its own, so that no moment from the first second to the promotion is spared."""
    seed = int(os.environ.get("SPECK_TEST_SEED", time.time_ns()))
    print(f"SPECK_TEST_SEED={seed} repeats these moments")
    chance = random.Random(seed)
    undisturbed = make(tmp_path / "undisturbed")
    began = time.monotonic()
    finish(undisturbed)
    whole_s = time.monotonic() - began
    expected = end_state(undisturbed)
    assert len(expected["scores"]) == 4, "val and test of two cells"
    assert expected["ledger"][0][0] == "promoted"
    for number in range(NUM_KILLS):
        pipeline = make(tmp_path / str(number))
        moment_s = chance.uniform(0, whole_s)
        with_descendants = chance.random() < 0.5
        said = kill_after(pipeline, moment_s, with_descendants=with_descendants)
        print(f"killed {'all' if with_descendants else 'the flow'} after {moment_s:.1f} of {whole_s:.1f} s: {said}")
        finish(pipeline)
        assert end_state(pipeline) == expected, f"killed after {moment_s:.1f} s: {said}"

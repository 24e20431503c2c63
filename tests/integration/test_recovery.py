"""kill -9 of the whole flow at its worst moments: the next run goes on, and nothing is there twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml
from chaos.pipeline import NUM_EPOCHS, FlowRun, Pipeline, make_pipeline
from chaos.processes import left_after, marked, wait_until
from mlflow import MlflowClient

from training.checkpoint import CorruptCheckpoint, newest_first, verify_checkpoint
from training.records import RESULT, read_result
from training.requests import stop_name

ENDS_S = 30.0
RUNS_S = 180.0
NUM_KILLS = 20


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return make_pipeline(tmp_path)


def finish(pipeline: Pipeline, epochs: int = NUM_EPOCHS) -> FlowRun:
    """Run to the end, and check everything that a finished run promises."""
    run = pipeline.start()
    try:
        assert run.wait(RUNS_S + 2 * epochs) == 0, run.output
    finally:
        run.process.kill()
        left = left_after(run.mark, ENDS_S)
    assert left == [], "processes that outlived a finished run"
    result = read_result(pipeline.run_folder)
    assert result is not None
    assert [entry.epoch for entry in pipeline.journal()] == list(range(1, epochs + 1))
    assert len(list(newest_first(pipeline.run_folder))) <= 3, "the two latest, and the best"
    assert not list(pipeline.run_folder.glob("*partial*"))
    assert_logged_once(pipeline, result.run_key, epochs)
    return run


def assert_logged_once(pipeline: Pipeline, run_key: str, epochs: int) -> None:
    client = MlflowClient(f"sqlite:///{pipeline.home / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`speck.run_key` = '{run_key}'")
    assert run.info.status == "FINISHED"
    for name in ("train/loss", "train/learning_rate"):
        steps = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, name))
        assert steps == {6 * epoch: 1 for epoch in range(1, epochs + 1)}, name


def killed(
    pipeline: Pipeline, *, of_last_epoch: bool = False, with_descendants: bool = False
) -> tuple[FlowRun, list[str]]:
    """A run killed after a report; with it the processes that outlived it, now dead, too."""
    run = pipeline.start()
    try:
        pipeline.kill_after_report(run, of_last_epoch=of_last_epoch, with_descendants=with_descendants)
    finally:
        run.process.kill()
        left = left_after(run.mark, ENDS_S)
    return run, left


def is_whole(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except CorruptCheckpoint:
        return False
    return True


def is_training_or_over(run: FlowRun) -> bool:
    return "data ready" in run.output or run.process.poll() is not None


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.soak
def test_ctrl_c_in_a_terminal_leaves_the_cluster_time_to_keep_a_checkpoint(pipeline: Pipeline) -> None:
    """A terminal sends it to every process of the group, not only to the flow."""
    experiment = yaml.safe_load((pipeline.repo / "experiment.yaml").read_text())
    experiment["training"]["epochs"] = 400
    (pipeline.repo / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    run = pipeline.start()
    try:
        wait_until(pipeline.reports, 150, "an epoch")
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.output
    finally:
        run.process.kill()
        left = left_after(run.mark, ENDS_S)
    assert left == [], "processes that outlived the flow"
    assert "interrupted; what was reached is kept" in run.output
    assert "the cluster does not answer" not in run.output
    # The job was asked to stop, and its workers heard of it: they kept a checkpoint after the last report.
    assert (pipeline.run_folder / stop_name(1)).is_file()
    newest = next(folder for folder in newest_first(pipeline.run_folder) if is_whole(folder))
    assert verify_checkpoint(newest).step >= pipeline.reports()[-1].step


@pytest.mark.soak
def test_three_kills_cost_the_work_in_flight_and_nothing_else(pipeline: Pipeline) -> None:
    # During an epoch: one is reported, the next one runs. Only the flow's own process is hit.
    _, left = killed(pipeline)

    # A power cut while a checkpoint is written.
    killed(pipeline, with_descendants=True)
    newest, before, *_ = [folder for folder in newest_first(pipeline.run_folder) if is_whole(folder)]
    redone = verify_checkpoint(newest).epoch
    assert verify_checkpoint(before).epoch == redone - 1
    first_reports = pipeline.journal()
    cut_short(newest / "model.safetensors")

    # Between the last epoch and the result. One epoch is done again, its first report stays.
    run, _ = killed(pipeline, of_last_epoch=True, with_descendants=True)
    assert f"skipping a checkpoint: {newest.name}" in run.output
    assert f"resuming from {before.name}" in run.output
    assert pipeline.journal()[: len(first_reports)] == first_reports
    assert [entry.attempt for entry in pipeline.reports() if entry.epoch == redone][1:] == [3]
    assert read_result(pipeline.run_folder) is None

    run = finish(pipeline)
    assert f"stopped after epoch {NUM_EPOCHS} of {NUM_EPOCHS}" in run.output
    assert f"epoch {NUM_EPOCHS}/{NUM_EPOCHS}" not in run.output, "nothing was left to train"
    assert left == [], "processes that outlived a killed run"

    # And once more: nothing to do, said with its reason.
    result = pipeline.run_folder / RESULT
    written_ns = result.stat().st_mtime_ns
    run = finish(pipeline)
    assert "cached" in run.output
    assert "finished 20" in run.output
    assert "data ready" not in run.output
    assert result.stat().st_mtime_ns == written_ns


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(pipeline: Pipeline) -> None:
    """Of the flow, Ray's driver, its controller, a worker, or of all; whatever was hit, the run ends well."""
    chance = random.Random(0)
    hit: Counter[str] = Counter()
    experiment = yaml.safe_load((pipeline.repo / "experiment.yaml").read_text())
    experiment["training"]["epochs"] = 150
    experiment["compute"]["checkpoint_every_minutes"] = 0.05
    (pipeline.repo / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    run = pipeline.start()
    while hit.total() < NUM_KILLS:
        # Two of three kills hit a training that is at work, the others whatever comes before.
        if chance.random() < 2 / 3:
            wait_until(partial(is_training_or_over, run), RUNS_S, "a training")
        time.sleep(chance.uniform(1, 15))
        if run.process.poll() is not None:
            assert list(pipeline.home.glob(f"runs/*/{RESULT}")) == [], f"the run ended before all kills: {hit}"
            assert left_after(run.mark, ENDS_S) == []
            run = pipeline.start()
            continue
        victim = chance.choice(("flow", "everything", "training.job", "TrainController", "RayTrainWorker"))
        if victim in {"flow", "everything"}:
            run.kill(with_descendants=victim == "everything")
        elif found := marked(run.mark, victim):
            chance.choice(found).kill()
        else:
            continue
        hit[victim] += 1
    run.kill()
    assert left_after(run.mark, ENDS_S) == []
    last = finish(pipeline, epochs=150)
    print(f"kills: {dict(hit)}; starts of workers: {len(list((pipeline.run_folder / 'ledger').iterdir()))}")
    assert "epoch 150/150 done" in last.output

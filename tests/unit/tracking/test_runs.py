from __future__ import annotations

import json
import logging
import math
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tracking import runs
from tracking.names import metric_name
from tracking.runs import DatasetRef, JournalEntry, end_abandoned, ensure_parent, ensure_run, finish, replay, upload

DATASET = DatasetRef("dots", "0123456789abcdef0123456789abcdef.dir", "/srv/dots", {"train": 7, "val": 2, "test": 3})


def start(client: Any, run_key: str, **changes: Any) -> str:
    values: dict[str, Any] = {
        "experiment": "dots",
        "name": "yolox-nano",
        "params": {"training.learning_rate": "0.01"},
        "tags": {"mlflow.source.git.commit": "f" * 40},
        "dataset": DATASET,
        "start_time_ms": 1_000,
    }
    return ensure_run(client, run_key=run_key, **({"training_id": run_key} | values | changes))


def epochs(count: int, first_ms: int = 1_000, first_step: int = 0) -> list[JournalEntry]:
    return [
        JournalEntry(
            step, step / 2, first_ms + i, {"train/loss": 1 / (step + 1), "coco/AP": step / 100, "system/cpu": 50.0}
        )
        for i, step in enumerate(range(first_step, first_step + count))
    ]


def test_one_run_per_key_with_params_tags_and_dataset(client: Any) -> None:
    run_id = start(client, "one")
    assert start(client, "one") == run_id
    assert start(client, "two") != run_id
    run = client.get_run(run_id)
    assert run.data.params == {"training.learning_rate": "0.01"}
    assert run.data.tags["mlflow.source.git.commit"] == "f" * 40
    assert (run.info.status, run.info.start_time, run.info.run_name) == ("RUNNING", 1_000, "yolox-nano")
    contexts = {i.tags[0].value: json.loads(i.dataset.profile)["num_images"] for i in run.inputs.dataset_inputs}
    assert contexts == {"train": 7, "val": 2, "test": 3}
    assert {i.dataset.digest for i in run.inputs.dataset_inputs} == {DATASET.version}


def test_a_deleted_run_and_a_deleted_experiment_come_back(client: Any) -> None:
    run_id = start(client, "deleted", experiment="short-lived")
    client.delete_run(run_id)
    assert start(client, "deleted", experiment="short-lived") == run_id
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    assert start(client, "deleted", experiment="short-lived") == run_id
    assert client.get_run(run_id).info.lifecycle_stage == "active"


def test_a_run_created_twice_by_a_lost_answer_is_one_run_afterwards(client: Any) -> None:
    run_id = start(client, "twice")
    experiment_id = client.get_run(run_id).info.experiment_id
    twin = client.create_run(experiment_id, start_time=2_000, tags={"speck.training": "twice"}).info.run_id
    assert [start(client, "twice") for _ in range(2)] == [run_id, run_id]
    put_away = client.get_run(twin)
    assert put_away.info.lifecycle_stage == "deleted"
    assert put_away.data.tags["speck.duplicate_of"] == run_id
    client.delete_run(run_id)
    assert start(client, "twice") == run_id, "it is this one that comes back, not its duplicate"


def test_cells_that_begin_together_share_the_dataset(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start(client, "first", dataset=DatasetRef("other", "0" * 32, "/srv/other", {"test": 1}))
    together = threading.Barrier(4)
    log_inputs = MlflowClient.log_inputs

    def log_together(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(timeout=2)
        log_inputs(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_inputs", log_together)
    with ThreadPoolExecutor(4) as pool:
        run_ids = list(pool.map(lambda key: start(client, key), ("a", "b", "c", "d")))
    assert [len(client.get_run(run_id).inputs.dataset_inputs) for run_id in run_ids] == [3] * 4


def test_another_training_of_a_run_key_has_a_run_of_its_own_and_the_earlier_one_points_to_it(client: Any) -> None:
    first = start(client, "again")
    second = start(client, "again", training_id="again.3")
    assert second != first
    assert start(client, "again", training_id="again.3") == second
    runs = [client.get_run(run_id).data.tags for run_id in (first, second)]
    assert [tags["speck.run_key"] for tags in runs] == ["again", "again"]
    assert runs[0]["speck.superseded_by"] == second
    assert "speck.superseded_by" not in runs[1]


def test_a_cell_has_its_latest_parent_and_every_parent_lists_it(client: Any) -> None:
    parents = [
        ensure_parent(client, train_all_id=key, name=key, start_time_ms=1_000, process={})
        for key in ("monday", "tuesday", "monday")
    ]
    assert parents[0] == parents[2] != parents[1]
    run_id = start(client, "shared", parent_run_id=parents[0])
    start(client, "shared", parent_run_id=parents[1])
    assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == parents[1]
    for parent in parents:
        assert client.get_run(parent).data.tags["speck.cell.shared"] == run_id


def test_a_train_all_whose_process_is_gone_does_not_run_for_ever(client: Any) -> None:
    def gone(process: Mapping[str, Any]) -> bool:
        return process.get("pid") in {1, 2}

    assert end_abandoned(client, gone) == []
    parents = [
        ensure_parent(client, train_all_id=str(pid), name=f"run {pid}", start_time_ms=1_000, process={"pid": pid})
        for pid in (1, 2, 3)
    ]
    client.set_terminated(parents[1], "FINISHED")
    assert end_abandoned(client, gone) == ["run 1"]
    assert end_abandoned(client, gone) == []
    assert [client.get_run(parent).info.status for parent in parents] == ["KILLED", "FINISHED", "RUNNING"]


def test_a_cached_cell_keeps_the_tags_of_the_code_that_trained_it(client: Any) -> None:
    run_id = start(client, "kept", tags={"mlflow.source.git.commit": "a" * 40, "speck.host": "first"})
    start(client, "kept", tags={"mlflow.source.git.commit": "b" * 40, "speck.host": "second", "late": "1"})
    tags = client.get_run(run_id).data.tags
    assert (tags["mlflow.source.git.commit"], tags["speck.host"], tags["late"]) == ("a" * 40, "first", "1")


def test_many_long_and_changed_params_are_kept_visibly(client: Any) -> None:
    params = {f"p{i}": str(i) for i in range(130)}
    run_id = start(client, "params", params={**params, "long": "x" * 7_000})
    start(client, "params", params={"p0": "other", "late": "1"})
    run = client.get_run(run_id)
    assert {key: run.data.params[key] for key in params} == params
    assert len(run.data.params["long"]) == 6_000
    assert "7000 characters" in run.data.params["long"]
    assert run.data.params["late"] == "1"
    assert run.data.tags["speck.changed.p0"] == "other"


def test_three_replays_leave_each_step_once_with_its_own_time(client: Any) -> None:
    run_id, entries = start(client, "replayed"), epochs(400)
    counts = [replay(client, run_id, entries) for _ in range(3)]
    assert [(c.num_sent, c.num_present) for c in counts] == [(1_200, 0), (0, 1_200), (0, 1_200)]
    for key in ("train/loss", "coco/AP", "system/cpu"):
        found = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key)]
        assert sorted(found) == [(entry.step, entry.timestamp_ms, entry.metrics[key]) for entry in entries]


def test_the_page_of_compared_runs_opens_with_the_validation_score(client: Any) -> None:
    run_id = start(client, "compared")
    metrics = {"system/cpu": 50.0, "train/loss": 1.0, "val/coco/AP": 0.25}
    replay(client, run_id, [JournalEntry(0, 1, 1_000, metrics), JournalEntry(1, 2, 2_000, metrics)])
    assert next(iter(client.get_run(run_id).data.metrics)) == "val/coco/AP"


def test_a_replay_cut_short_is_completed(client: Any) -> None:
    run_id, entries = start(client, "cut"), epochs(20)
    replay(client, run_id, entries[:7])
    assert replay(client, run_id, entries).num_sent == 13 * 3
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == list(range(20))


def test_the_store_itself_tolerates_a_batch_sent_twice(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, entries = start(client, "resent"), epochs(5)
    monkeypatch.setattr(client, "get_metric_history", lambda *_: [])
    assert [replay(client, run_id, entries).num_sent for _ in range(2)] == [15, 15]
    monkeypatch.undo()
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == list(range(5))


def test_an_epoch_redone_after_a_crash_counts_once(client: Any) -> None:
    run_id = start(client, "redone")
    entries = epochs(4) + epochs(3, first_ms=9_000, first_step=3)
    assert replay(client, run_id, reversed(entries)).num_repeated == 3
    history = sorted((m.step, m.timestamp) for m in client.get_metric_history(run_id, "train/loss"))
    assert history == [(0, 1_000), (1, 1_001), (2, 1_002), (3, 1_003), (4, 9_001), (5, 9_002)]


def test_a_cell_trained_again_adds_only_what_is_missing(client: Any) -> None:
    """Another time at each step, one metric that the first training had not, and two steps more."""
    run_id = start(client, "again")
    first = epochs(4)
    replay(client, run_id, first)
    again = [
        JournalEntry(entry.step, entry.epoch, entry.timestamp_ms, {**entry.metrics, "a/new": 1.0})
        for entry in epochs(6, first_ms=50_000)
    ]
    counts = replay(client, run_id, again)
    assert (counts.num_sent, counts.num_present) == (2 * 3 + 6, 4 * 3)
    history = sorted((m.step, m.timestamp) for m in client.get_metric_history(run_id, "train/loss"))
    assert history == [(step, 1_000 + step) for step in range(4)] + [(4, 50_004), (5, 50_005)]
    assert len(client.get_metric_history(run_id, "a/new")) == 6
    assert replay(client, run_id, first + again).num_sent == 0


def test_an_entry_larger_than_a_batch_arrives_whole(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "METRICS_PER_BATCH", 20)
    run_id = start(client, "wide")
    entry = JournalEntry(0, 0.0, 1_000, {f"m{i}": float(i) for i in range(50)})
    replay(client, run_id, [entry])
    replay(client, run_id, [entry])
    assert client.get_run(run_id).data.metrics == entry.metrics
    assert len(client.get_metric_history(run_id, "m49")) == 1


def test_values_that_are_not_finite_are_counted_and_named(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    run_id = start(client, "nan")
    entries = [
        JournalEntry(0, 0.0, 1_000, {"train/loss": math.nan, "coco/AP": 0.1}),
        JournalEntry(1, 1.0, 1_001, {"train/loss": -math.inf}),
    ]
    with caplog.at_level(logging.WARNING):
        assert replay(client, run_id, entries).num_non_finite == 2
        assert replay(client, run_id, entries).num_non_finite == 2
    run = client.get_run(run_id)
    assert run.data.metrics == {"coco/AP": 0.1}
    assert run.data.tags["speck.num_non_finite"] == "2"
    assert [record.getMessage().count("train/loss") for record in caplog.records] == [1]


def test_finishing_twice_uploads_once_and_keeps_times(client: Any, files: Path) -> None:
    run_id = start(client, "finished")
    for _ in range(2):
        finish(client, run_id, "FINISHED", scores={"test/coco/AP": 0.25}, artifacts_dir=files, end_time_ms=5_000)
    assert start(client, "finished") == run_id
    info = client.get_run(run_id).info
    assert (info.status, info.end_time) == ("FINISHED", 5_000)
    assert [(m.timestamp, m.value) for m in client.get_metric_history(run_id, "test/coco/AP")] == [(5_000, 0.25)]
    assert upload(client, run_id, files) == 0
    (files / "plots" / "curve.txt").write_text("0 1 2 3")
    assert upload(client, run_id, files) == 1
    downloaded = Path(client.download_artifacts(run_id, "plots/curve.txt"))
    assert downloaded.read_text() == "0 1 2 3"


def test_finishing_later_adds_changed_scores_only(client: Any) -> None:
    run_id = start(client, "rescored")
    for end_time_ms, changed in ((5_000, 0.25), (6_000, 0.5)):
        scores = {"test/coco/AP": changed, "test/coco/AR": 0.75}
        finish(client, run_id, "FINISHED", scores=scores, artifacts_dir=None, end_time_ms=end_time_ms)
    assert client.get_run(run_id).data.metrics == {"test/coco/AP": 0.5, "test/coco/AR": 0.75}
    assert len(client.get_metric_history(run_id, "test/coco/AR")) == 1


def test_a_run_that_was_scored_again_shows_the_new_score_also_where_it_is_lower(client: Any) -> None:
    """It finished when it finished: the time is the same."""
    run_id = start(client, "scored-lower")
    counts = [
        finish(client, run_id, "FINISHED", scores={"coco/AP": ap}, artifacts_dir=None, end_time_ms=5_000).num_metrics
        for ap in (0.5, 0.25, 0.25)
    ]
    assert counts == [1, 1, 0]
    assert client.get_run(run_id).data.metrics == {"coco/AP": 0.25}


def test_other_bytes_of_the_same_size_are_uploaded_again(client: Any, files: Path) -> None:
    run_id = start(client, "same-size")
    assert [upload(client, run_id, files), upload(client, run_id, files, "model")] == [2, 2]
    (files / "plots" / "curve.txt").write_text("9 9 9")
    assert [upload(client, run_id, files) for _ in range(2)] == [1, 0]
    for path, expected in (("plots/curve.txt", "9 9 9"), ("model/plots/curve.txt", "0 1 2")):
        assert Path(client.download_artifacts(run_id, path)).read_text() == expected
    folder = Path(client.download_artifacts(run_id, ""))
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_class_names_that_mlflow_refuses_are_logged_and_kept_apart(client: Any) -> None:
    run_id = start(client, "class-names")
    scores = {f"test/coco/AP/{label}": 0.5 for label in ("person (sitting)", "person [sitting]", "a&b", "car")}
    replay(client, run_id, [JournalEntry(0, 0.0, 1_000, {"val/it's": 0.25})])
    assert replay(client, run_id, [JournalEntry(0, 0.0, 2_000, {"val/it's": 0.25})]).num_present == 1
    finish(client, run_id, "FINISHED", scores=scores, artifacts_dir=None, end_time_ms=5_000)
    logged = client.get_run(run_id).data.metrics
    assert len(logged) == 5
    assert logged["test/coco/AP/car"] == 0.5
    assert logged[metric_name("val/it's")] == 0.25


def test_a_failed_run_runs_again_when_its_cell_is_retried(client: Any) -> None:
    run_id = start(client, "retried")
    finish(client, run_id, "FAILED", scores={}, artifacts_dir=None, end_time_ms=5_000)
    assert start(client, "retried") == run_id
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_score_that_is_not_finite_closes_nothing(client: Any) -> None:
    run_id = start(client, "unscored")
    with pytest.raises(ValueError, match="test/coco/AP"):
        finish(client, run_id, "FINISHED", scores={"test/coco/AP": math.nan}, artifacts_dir=None, end_time_ms=5_000)
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_run_key_that_could_change_the_search_is_refused(client: Any) -> None:
    with pytest.raises(ValueError, match=r"speck\.training"):
        start(client, "x' OR 'a' = 'a")

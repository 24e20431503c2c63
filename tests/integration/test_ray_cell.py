"""Real cells on a real embedded Ray cluster, one for the whole file, beside another user's on the same machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from chaos.processes import MARK, left_after, marked, new_mark, wait_until
from chaos.proxy import proxy
from safetensors.torch import load_file

from flows.evaluate import score_run
from flows.settings import Settings
from training.artifacts import read_operating_point
from training.checkpoint import newest_first, verify_checkpoint
from training.cluster import Cluster, embedded_cluster
from training.jobs import CellFailed, Jobs, code_snapshot
from training.records import RunResult, read_attempt, read_journal, read_result, record_attempt
from training.say import PROGRESS_MARK
from training.scoring import score_split
from training.spec import ComputeSpec, RunSpec
from training.state import build_model
from training.workers import Workers

ROOT = Path(__file__).parents[2]
MakeSpec = Callable[..., RunSpec]
TWO_WORKERS = ComputeSpec(workers=2, max_failures=2)
ARTIFACTS = {
    "weights.safetensors", "spec.json", "seconds.json", "score_val.json", "score_test.json", "detections_val.json",
    "detections_test.json", "pr_curve_test.png", "predictions_test.jpg", "training_curves.png", "operating_point.json",
    "analysis_val.json", "analysis_test.json", "foreground_val.json", "foreground_test.json", "foreground_val.png",
    "foreground_test.png", "report.html",
}  # fmt: skip


@dataclass
class Service:
    """The cluster of this file, and where its cells store their runs."""

    cluster: Cluster
    jobs: Jobs
    storage: Path
    mark: str

    def submit(self, spec: RunSpec, source: str) -> tuple[str, Path]:
        """Submit a new attempt; returns its id and run folder."""
        run_folder = self.storage / spec.run_key
        attempt = record_attempt(run_folder, spec, data_source=source, code_hash="c" * 12)
        with code_snapshot(ROOT) as code:
            return self.jobs.submit(attempt, run_folder, code), run_folder


NEIGHBOUR = """
import sys
from pathlib import Path
from training.cluster import embedded_cluster
with embedded_cluster(Path(sys.argv[1]), num_cpus=1):
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Another process's cluster, with a token of its own; it is killed in the end and must leave nothing."""
    mark, home = new_mark(), tmp_path_factory.mktemp("neighbour")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {MARK: mark, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR, str(home)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield
        finally:
            process.kill()
    assert left_after(mark, 30) == [], "processes that outlived a killed cluster"


@pytest.fixture(scope="module")
def service(neighbour: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home, mark = tmp_path_factory.mktemp("home of runs"), new_mark()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, mark)
        environment.setenv("SPECK_STORE", str(home / "store"))
        with embedded_cluster(home, num_cpus=2) as cluster:
            yield Service(cluster, Jobs(cluster), home / "runs", mark)
    assert left_after(mark, 30) == [], "processes that outlived the cluster"


@dataclass
class Finished:
    """A cell that ran to its end, and what was seen on the way."""

    spec: RunSpec
    folder: Path
    submission_id: str
    result: RunResult
    lines: list[str] = field(default_factory=list)
    living: list[str | None] = field(default_factory=list)
    refusal: str = ""


@pytest.fixture(scope="module")
def finished(service: Service, tiny: Any, tiny_spec: MakeSpec) -> Finished:
    spec = tiny_spec(compute=TWO_WORKERS)
    submission_id, folder = service.submit(spec, tiny.source)
    lines: list[str] = []
    living = [service.jobs.living(spec.run_key), service.jobs.living("0" * 12)]
    with code_snapshot(ROOT) as code, pytest.raises(RuntimeError) as refused:
        service.jobs.submit(read_attempt(folder, 1), folder, code)
    service.jobs.follow(submission_id, lines.append)
    result = read_result(folder)
    assert result is not None
    living.append(service.jobs.living(spec.run_key))
    return Finished(spec, folder, submission_id, result, lines, living, str(refused.value))


def test_a_cell_leaves_a_valid_result(finished: Finished, tiny: Any) -> None:
    result = finished.result
    assert (result.run_key, result.spec, result.attempts) == (finished.spec.run_key, finished.spec, 1)
    assert {name.removeprefix("artifacts/") for name in result.files} == ARTIFACTS
    assert {"train", "score_test", "job"} <= result.seconds.keys()
    for split, score in result.scores.items():
        assert (score.split, score.dataset_version) == (split, tiny.version)
        assert score.counts["num_detected_images"] == score.counts["num_images"] == 8
    for name in ARTIFACTS:
        if name.endswith((".png", ".jpg")):
            picture = cv2.imread(str(finished.folder / "artifacts" / name))
            assert picture is not None
            assert min(picture.shape[:2]) > 100
            assert len(torch.from_numpy(picture).unique()) > 8, f"{name} is blank"


def test_the_journal_has_each_epoch_once(finished: Finished) -> None:
    entries = read_journal(finished.folder)
    assert [(entry.epoch, entry.step, entry.attempt) for entry in entries] == [(1, 6, 1), (2, 12, 1)]
    assert len(list((finished.folder / "journal").iterdir())) == 2
    for entry in entries:
        assert entry.metrics["train/loss"] > 0
        assert entry.metrics["system/process_memory_gib"] > 0
        assert not entry.non_finite
    assert entries[0].timestamp_ms < entries[1].timestamp_ms <= finished.result.finished_ms
    assert entries[-1].metrics["val/coco/AP"] == finished.result.scores["val"].metrics["coco/AP"]


def test_two_checkpoints_are_kept_whole(finished: Finished) -> None:
    manifests = [verify_checkpoint(folder) for folder in newest_first(finished.folder)]
    assert [(manifest.epoch, manifest.run_key) for manifest in manifests] == [
        (2, finished.spec.run_key), (1, finished.spec.run_key),
    ]  # fmt: skip


def test_the_stored_weights_give_the_stored_score(finished: Finished, tiny: Any) -> None:
    """In one process, without Ray: what two workers scored together is what anyone gets from the file."""
    spec, artifacts = finished.spec, finished.folder / "artifacts"
    model = build_model(spec)
    model.load_state_dict(load_file(artifacts / "weights.safetensors"))
    for split, stored in finished.result.scores.items():
        alone, chosen = Workers(0, 1, torch.device("cpu")), read_operating_point(artifacts)
        again = score_split(spec, model, tiny.folder, split, alone, operating_point=chosen)
        assert again is not None
        assert again.result.score_key == stored.score_key
        assert again.result.counts == stored.counts
        assert again.result.metrics == pytest.approx(stored.metrics, abs=1e-6)
        detections = json.loads((artifacts / f"detections_{split}.json").read_text())
        assert [d["score"] for d in again.detections] == pytest.approx([d["score"] for d in detections], rel=1e-4)


def test_a_living_job_is_found_and_its_id_is_used_once(finished: Finished) -> None:
    during, stranger, after = finished.living
    assert during == finished.submission_id == f"{finished.spec.run_key}-1"
    assert stranger is None
    assert after is None
    assert "already exists" in finished.refusal
    assert any("data ready on 2 workers" in line for line in finished.lines)
    assert any("epoch 2/2 step 12/12" in line for line in finished.lines)


def test_two_workers_score_as_one_does_and_leave_nothing(
    finished: Finished, service: Service, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECK_HOME", str(service.storage.parent))
    monkeypatch.setenv("SPECK_DATA_SOURCE", tiny.source)
    monkeypatch.setattr("flows.evaluate.embedded_cluster", lambda _: nullcontext(service.cluster))
    weights, before = finished.folder / "artifacts" / "weights.safetensors", set(service.storage.iterdir())
    lines: list[str] = []
    # As many as each worker has: more sum in another order.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (alone, together) = (
        score_run(finished.spec, weights, Settings(), ["train"], workers=workers, say=lines.append)[1]["train"]
        for workers in (1, 2)
    )
    torch.set_num_threads(threads)
    assert together.detections == alone.detections
    assert together.result == alone.result
    assert together.result.counts["num_detected_images"] == 24
    assert [line.partition(",")[0] for line in lines] == [
        "24/24 images", "starting a Ray job of 2 workers", "24/24 images",
    ]  # fmt: skip
    monkeypatch.setattr("flows.evaluate.write_json", lambda path, _: path.write_text("no order"))
    with pytest.raises(CellFailed, match="ended FAILED"):
        score_run(finished.spec, weights, Settings(), ["train"], workers=2)
    assert set(service.storage.iterdir()) == before


@pytest.mark.parametrize("authorization", [None, "Bearer " + "0" * 64])
def test_the_job_api_refuses_whoever_has_no_token(service: Service, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    submission = b'{"entrypoint": "touch /tmp/never"}'
    for request in (
        urllib.request.Request(f"{service.cluster.jobs_url}/api/jobs/", headers=headers),
        urllib.request.Request(f"{service.cluster.jobs_url}/api/jobs/", submission, headers, method="POST"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=300)
        assert refused.value.code in {401, 403}


def test_a_missing_dataset_fails_the_cell_with_its_cause(service: Service, tiny: Any, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec()
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"version": "0" * 32})})
    submission_id, folder = service.submit(spec, tiny.source)
    with pytest.raises(CellFailed) as failed:
        service.jobs.follow(submission_id, lambda _: None)
    first_line = str(failed.value).splitlines()[0]
    assert "ended FAILED" in first_line, first_line
    assert f"{tiny.source}/files/md5/00/{'0' * 30}.dir: not in this source" in first_line
    assert read_result(folder) is None
    assert service.jobs.living(spec.run_key) is None


@pytest.mark.soak
def test_a_killed_worker_costs_the_epoch_in_flight_alone(service: Service, tiny: Any, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(epochs=4, batch_size=2, seed=2, compute=TWO_WORKERS)
    submission_id, folder = service.submit(spec, tiny.source)
    killed: list[int] = []

    def kill_after_the_first_epoch() -> None:
        wait_until(lambda: marked(service.mark, "RayTrainWorker"), 60, "no training worker", every_s=0.2)
        worker = marked(service.mark, "RayTrainWorker")[0]
        wait_until(lambda: any((folder / "journal").glob("*.json")), 60, "no journal")
        worker.kill()
        killed.append(worker.pid)

    lines: list[str] = []
    killer = threading.Thread(target=kill_after_the_first_epoch)
    killer.start()
    service.jobs.follow(submission_id, lines.append)
    killer.join()
    assert killed
    result = read_result(folder)
    assert result is not None
    epochs = [(entry.epoch, entry.step, entry.attempt) for entry in read_journal(folder)]
    assert epochs == [(1, 12, 1), (2, 24, 1), (3, 36, 1), (4, 48, 1)]
    starts = [line for line in lines if "data ready on" in line]
    assert len(starts) == 2, starts
    assert "starting at epoch 1" in starts[0]
    assert "resuming from 0" in starts[1]


@pytest.mark.soak
def test_a_cut_connection_is_made_again_and_no_line_comes_twice(
    service: Service, tiny: Any, tiny_spec: MakeSpec
) -> None:
    submission_id, _ = service.submit(tiny_spec(compute=TWO_WORKERS, epochs=3, seed=77), tiny.source)
    lines: list[str] = []
    with proxy(int(service.cluster.jobs_url.rpartition(":")[2])) as between:
        cut = Jobs(Cluster(service.cluster.address, f"http://127.0.0.1:{between.port}"))

        def on_line(line: str) -> None:
            lines.append(line)
            if PROGRESS_MARK in line and between.num_cut < 4:
                between.cut()

        cut.follow(submission_id, on_line)
        assert between.num_cut >= 4
    whole: list[str] = []
    service.jobs.follow(submission_id, whole.append)
    assert lines == whole
    assert [line for line in lines if "scoring on the test split" in line] != []

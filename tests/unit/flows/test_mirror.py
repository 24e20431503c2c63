"""Runs whose records lie on a real S3 server, read through the folders that are kept like them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from services.fault_proxy import FaultProxy
from unit.training.storage import Storage, make_checkpoint, tree

import flows.gc
import training.store
from data.whole_file import write_whole
from flows.cells import CellRunner
from flows.gc import by_kind, find_garbage, free
from flows.mirror import INDEX, Mirror, mirror
from flows.plan import plan_cell
from flows.record import Recorder
from flows.settings import Settings
from training.checkpoint import file_sha256
from training.records import (
    DIRTY_DIFF,
    RESULT,
    Attempt,
    JournalEntry,
    RunResult,
    hash_files,
    read_attempt,
    read_result,
    record_attempt,
    write_entry,
    write_result,
)
from training.spec import RunSpec
from training.state import warm_start_path
from training.store import MANIFEST, FolderStore, RunStore, StorageUnavailable, open_store

WEIGHTS = "sha256:" + "5" * 64


@pytest.fixture
def on_s3(settings: Settings, bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a user whose cluster keeps runs on S3."""
    monkeypatch.setenv("SPECK_STORAGE", f"{bucket.url}/")
    return Settings()


@pytest.fixture
def spec(cell_spec: Callable[..., RunSpec]) -> RunSpec:
    return cell_spec()


@pytest.fixture
def records(on_s3: Settings, bucket: Storage, spec: RunSpec) -> RunStore:
    """Those of the run of `spec` on S3."""
    return open_store(f"{bucket.url}/{spec.run_key}")


def entry(spec: RunSpec, epoch: int) -> JournalEntry:
    return JournalEntry(
        run_key=spec.run_key, attempt=1, step=6 * epoch, epoch=epoch, timestamp_ms=1, seconds=1.0, code_hash="c",
        metrics={"train/loss": 2.5},
    )  # fmt: skip


def train(
    store: RunStore, spec: RunSpec, folder: Path, make_result: Callable[..., RunResult], code_hash: str,
    epochs: int = 2, attempt: int = 1,
) -> None:  # fmt: skip
    """Leave in the store what a training leaves, of one epoch or to the end."""
    for epoch in range(1, epochs + 1):
        checkpoint = make_checkpoint(folder / f"{epoch}", epoch, run_key=spec.run_key)
        store.upload(checkpoint, f"checkpoints/{epoch}", last=MANIFEST)
        write_entry(store, entry(spec, epoch))
    if epochs == 2:
        (folder / "artifacts").mkdir()
        (folder / "artifacts/weights.safetensors").write_bytes(code_hash.encode())
        (folder / "artifacts/seconds.json").write_bytes(b"{}")
        store.upload(folder / "artifacts", "artifacts", last="seconds.json")
        files = hash_files(folder, folder / "artifacts")
        write_result(store, make_result(spec, 0.25, 0.5, files=files, code_hash=code_hash, attempts=attempt))


def test_records_are_brought_once_and_results_last(proxy: FaultProxy, bucket: Storage, tmp_path: Path) -> None:
    store, folder = bucket.open(), tmp_path / "here"
    small = {name: name.encode() for name in ("attempts/001.json", "journal/001-6.json", "artifacts/a/b.png", RESULT)}
    manifests = {"checkpoints/1/manifest.json": b"{}"}
    for name in (*small, *manifests, "checkpoints/1/model.safetensors", "warm_start/x.safetensors", "stop/001"):
        store.write(name, name.encode() if name in small else b"{}")
    proxy.requests.clear()
    assert mirror(store, folder) == [*sorted({*small, *manifests} - {RESULT}), RESULT]
    asked = [
        path.partition(f"{store.url.removeprefix('s3:/')}/")[2] for method, path in proxy.requests if path[-1] != "/"
    ]
    assert [name for name in asked if name][-1] == RESULT
    (folder / INDEX).unlink()
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {*small, *manifests}
    assert all((folder / name).read_bytes() == content for name, content in (small | manifests).items())


def test_only_what_changed_is_brought_again(proxy: FaultProxy, bucket: Storage, tmp_path: Path) -> None:
    store, folder = bucket.open(), tmp_path / "here"
    assert mirror(store, folder) == []
    assert not folder.exists()
    for name in ("a.json", "b.json", "c/d.json"):
        store.write(name, b"old")
    assert mirror(store, folder) == ["a.json", "b.json", "c/d.json"]
    proxy.requests.clear()
    assert mirror(store, folder) == []
    assert sum(proxy.requests.values()) == 1, "one listing"
    store.write("a.json", b"new")
    store.delete("b.json")
    (folder / "c/d.json").unlink()
    (folder / "own.txt").write_text("not from there")
    assert mirror(store, folder) == ["a.json", "c/d.json"]
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [INDEX, "a.json", "d.json", "own.txt"]
    assert (folder / "a.json").read_bytes() == b"new"
    for damage in ("", "{", "[1]", '{"a.json": 3}'):
        (folder / INDEX).write_text(damage)
        assert mirror(store, folder) == ["a.json", "c/d.json"]
        assert mirror(store, folder) == []


def test_every_record_arrives_though_requests_fail(
    proxy: FaultProxy, bucket: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    proxy.failing_share = 0.2
    store = bucket.open()
    for number in range(40):
        store.write(f"journal/{number}.json", bytes([number]) * 1_000)
    mirror(store, tmp_path / "here")
    (tmp_path / "here" / INDEX).unlink()
    assert tree(tmp_path / "here") == tree(bucket.file("."))
    assert proxy.num_faults > 5


def test_without_s3_the_folder_is_the_storage(settings: Settings, spec: RunSpec) -> None:
    here = Mirror(settings, spec.run_key)
    assert here.url == str(here.folder) == str(settings.storage / spec.run_key)
    here.pull()
    here.pull_numbers()
    here.push(RESULT, "artifacts")
    here.push_warm_start(WEIGHTS)
    assert here.size_bytes("checkpoints") == 0
    assert not settings.home.exists()
    record_attempt(here.folder, spec, data_source="", code_hash="c")
    write_whole(here.folder / RESULT, b"{}")
    here.delete(RESULT)
    assert [path.name for path in here.folder.iterdir()] == ["attempts"]
    assert here.put_aside() == settings.home / "superseded" / spec.run_key / spec.run_key


@pytest.mark.parametrize("url", ["/a/folder", "http://a/b", "s3://bucket", "s3://key:s3cret@bucket/a"])
def test_a_storage_that_is_not_on_s3_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SPECK_STORAGE", url)
    with pytest.raises(
        ValidationError, match=r"must be s3://bucket/prefix; for a shared folder set SPECK_HOME"
    ) as caught:
        Settings()
    assert "s3cret" not in str(caught.value)


def test_the_plan_sees_what_lies_on_s3(
    on_s3: Settings, records: RunStore, spec: RunSpec, bucket: Storage, tmp_path: Path,
    make_result: Callable[..., RunResult],
) -> None:  # fmt: skip
    planned = plan_cell(spec, on_s3)
    assert planned.state == "train"
    assert not on_s3.home.exists()
    train(records, spec, tmp_path / "half", make_result, planned.code_hash, epochs=1)
    assert (plan_cell(spec, on_s3).state, plan_cell(spec, on_s3).epochs_done) == ("resume", 1)
    records.delete("checkpoints")
    train(records, spec, tmp_path / "whole", make_result, planned.code_hash)
    assert plan_cell(spec, on_s3).state == "cached"
    (on_s3.storage / spec.run_key / "artifacts/weights.safetensors").write_bytes(b"damaged here")
    assert plan_cell(spec, on_s3).state == "cached"
    records.write("artifacts/weights.safetensors", b"damaged there")
    damaged = plan_cell(spec, on_s3)
    assert damaged.state == "resume"
    assert "weights.safetensors is missing or differs" in damaged.why


def test_a_storage_that_is_away_stops_a_plan(on_s3: Settings, spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or everything would be trained anew."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(training.store, "PATIENCE_S", 0.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    with pytest.raises(StorageUnavailable, match="Could not connect"):
        plan_cell(spec, on_s3)


class Cluster:
    """A cluster far away: it has the address of a run's records and nothing else. Its job trains at once."""

    embedded = False

    def __init__(self, tmp_path: Path, make_result: Callable[..., RunResult], on_end: Callable[[], None]) -> None:
        self.folder, self.make_result, self.on_end = tmp_path / "far away", make_result, on_end
        self.attempts: list[Attempt] = []

    def living(self, _: str) -> None:
        return None

    def require_room(self, _: RunSpec) -> None:
        """There is always room."""

    def page(self, _: str) -> None:
        """There is no dashboard."""

    def submit(self, attempt: Attempt, run: str, _: Path) -> str:
        store = open_store(run)
        assert read_attempt(store, attempt.number) == attempt
        assert not store.exists(RESULT)
        assert store.read(f"warm_start/{'5' * 64}.safetensors") == b"weights to start from"
        self.attempts.append(attempt)
        folder = self.folder / str(attempt.number)
        train(store, attempt.spec, folder, self.make_result, attempt.code_hash, attempt=attempt.number)
        return attempt.submission_id

    def follow(self, _: str, on_line: Callable[[str], None], __: Callable[[], bool]) -> None:
        on_line("a line")
        self.on_end()


def run_cell(
    settings: Settings, spec: RunSpec, cluster: Cluster, said: list[str], on_code_change: str = "warn"
) -> RunResult:
    settings.home.mkdir(exist_ok=True)
    settings.home.joinpath("mlflow.db").write_text("no database")
    recorder = Recorder(settings.tracking_uri, None, said.append)
    runner = CellRunner(
        lambda: cluster, settings, recorder, said.append, threading.Event(), on_code_change,  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    return runner.run(plan_cell(spec, settings, on_code_change)).result  # type: ignore[arg-type]


@pytest.fixture
def warm(on_s3: Settings, spec: RunSpec) -> RunSpec:
    """A run that starts from weights of this machine."""
    path = warm_start_path(on_s3.storage, WEIGHTS)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights to start from")
    return spec.with_warm_start(WEIGHTS)


def test_a_cell_runs_on_a_cluster_that_shares_no_folder(
    on_s3: Settings, warm: RunSpec, tmp_path: Path, make_result: Callable[..., RunResult]
) -> None:
    cluster, said = Cluster(tmp_path, make_result, lambda: None), list[str]()
    result = run_cell(on_s3, warm, cluster, said)
    assert read_result(on_s3.storage / warm.run_key) == result
    assert [text for text in said if text.startswith("epoch")] == [f"epoch {n}/2 done: loss 2.500" for n in (1, 2)]
    assert run_cell(on_s3, warm, cluster, said) == result
    assert [attempt.number for attempt in cluster.attempts] == [1]


def test_a_storage_that_is_away_while_a_job_runs_costs_no_run(
    on_s3: Settings, proxy: FaultProxy, warm: RunSpec, tmp_path: Path, make_result: Callable[..., RunResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(training.store, "PATIENCE_S", 0.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    said: list[str] = []

    def go_away() -> None:
        proxy.failing_share = 1.0

    def told(text: str) -> None:
        said.append(text)
        if text.startswith("no news of the run"):
            proxy.failing_share = 0.0

    cluster = Cluster(tmp_path, make_result, go_away)
    on_s3.home.mkdir(exist_ok=True)
    on_s3.home.joinpath("mlflow.db").write_text("no database")
    recorder = Recorder(on_s3.tracking_uri, None, told)
    runner = CellRunner(lambda: cluster, on_s3, recorder, told, threading.Event())  # type: ignore[arg-type,return-value]
    result = runner.run(plan_cell(warm, on_s3)).result
    assert read_result(on_s3.storage / warm.run_key) == result
    assert sum(text.startswith("no news of the run: s3://bucket/") for text in said) == 1


def test_a_training_that_is_put_aside_stays_on_s3_and_its_numbers_are_used_up(
    on_s3: Settings, warm: RunSpec, bucket: Storage, tmp_path: Path, make_result: Callable[..., RunResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cluster, said = Cluster(tmp_path, make_result, lambda: None), list[str]()
    run_cell(on_s3, warm, cluster, said)
    store = open_store(f"{bucket.url}/{warm.run_key}")
    write_result(store, make_result(warm, 0.25, 0.5, files={}, code_hash="older"))
    new = run_cell(on_s3, warm, cluster, said, "retrain")
    assert [attempt.number for attempt in cluster.attempts] == [1, 2]
    assert new.code_hash != "older"
    aside = f"superseded/{warm.run_key}/{warm.run_key}"
    assert read_result(on_s3.home / aside) is not None
    # Beside what a checkout with changes leaves of them.
    names = [name for name in FolderStore(bucket.files).names(aside) if not name.endswith(DIRTY_DIFF)]
    assert names == sorted(f"{aside}/{name}" for name in (
        "artifacts/seconds.json", "artifacts/weights.safetensors", "attempts/001.json", "journal/001-000000006.json",
        "journal/001-000000012.json", RESULT,
    ))  # fmt: skip
    assert "attempts/002.json" in store.names("attempts")
    assert "attempts/001.json" not in store.names("attempts")
    # Another machine, that never saw the first training, retrains again.
    write_result(store, make_result(warm, 0.25, 0.5, files={}, code_hash="older", attempts=2))
    monkeypatch.setenv("SPECK_HOME", str(tmp_path / "other home"))
    other = Settings()
    weights = warm_start_path(other.storage, WEIGHTS)
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights to start from")
    run_cell(other, warm, cluster, said, "retrain")
    assert [attempt.number for attempt in cluster.attempts] == [1, 2, 3]


def test_what_is_scored_again_goes_up(
    on_s3: Settings, records: RunStore, spec: RunSpec, tmp_path: Path, make_result: Callable[..., RunResult]
) -> None:
    train(records, spec, tmp_path / "made", make_result, plan_cell(spec, on_s3).code_hash)
    here = Mirror(on_s3, spec.run_key)
    here.pull()
    (here.folder / "artifacts/seconds.json").unlink()
    (here.folder / "artifacts/more").mkdir()
    (here.folder / "artifacts/more/score.json").write_bytes(b"1")
    files = hash_files(here.folder, here.folder / "artifacts")
    write_result(here.folder, make_result(spec, 0.5, 0.75, files=files, code_hash="c"))
    here.push("artifacts", RESULT)
    assert records.names("artifacts") == ["artifacts/more/score.json", "artifacts/weights.safetensors"]
    assert records.read(RESULT) == (here.folder / RESULT).read_bytes()
    before = file_sha256(here.folder / INDEX)
    here.pull()
    assert file_sha256(here.folder / INDEX) == before, "nothing is brought that was sent"
    mirror(records, tmp_path / "elsewhere")
    assert read_result(tmp_path / "elsewhere") == read_result(here.folder)


def test_checkpoints_of_a_finished_run_are_freed_on_s3(
    on_s3: Settings, records: RunStore, spec: RunSpec, tmp_path: Path, make_result: Callable[..., RunResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(flows.gc, "MIN_AGE_S", -60.0)
    train(records, spec, tmp_path / "made", make_result, plan_cell(spec, on_s3).code_hash)
    plan_cell(spec, on_s3)
    (tmp_path / "repo/.dvc").mkdir(parents=True)
    (tmp_path / "repo/.dvc/config").write_text("")
    garbage = find_garbage(on_s3, tmp_path / "repo", tmp_path / "node")
    found = by_kind(garbage)["checkpoints of a finished run"]
    assert found.names == [spec.run_key]
    assert found.size_bytes > 2 * 10_000
    assert free(garbage, on_s3, tmp_path / "repo", tmp_path / "node") == garbage
    assert records.names("checkpoints") == []
    assert find_garbage(on_s3, tmp_path / "repo", tmp_path / "node") == []
    assert plan_cell(spec, on_s3).state == "cached"

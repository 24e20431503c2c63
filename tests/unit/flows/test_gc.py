"""What may go and what must stay. The DVC cache is written by hand, as DVC writes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import store
from filelock import FileLock
from typer.testing import CliRunner

import flows.gc
from data.store import MARKER
from flows.cli import app
from flows.gc import Garbage, RunsAtWork, UnreadableRecord, by_kind, find_garbage, free
from flows.plan import plan_cell
from flows.settings import Settings
from tracking.client import connect
from tracking.registry import DATASET_VERSION, Version, register
from tracking.runs import TRAINING, DatasetRef, ensure_run
from training.checkpoint import save_checkpoint
from training.records import RunResult, hash_files, record_attempt, supersede, write_result
from training.spec import RunSpec
from training.state import warm_start_path

WARM = "sha256:" + "5" * 64


@pytest.fixture(autouse=True)
def _of_any_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.gc, "MIN_AGE_S", -60.0)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return tmp_path / "node"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with the dataset `tiny-squares`, not prepared yet."""
    repo = tmp_path / "repo"
    (repo / "data/catalog").mkdir(parents=True)
    card = {"name": "tiny-squares", "description": "d", "licence": "l", "format": "coco", "source": "s"}
    (repo / "data/catalog/tiny-squares.yaml").write_text(yaml.safe_dump(card | {"classes": ["bright", "dark"]}))
    (repo / ".dvc").mkdir()
    (repo / ".dvc/config").write_text(f"[core]\nremote = storage\n['remote \"storage\"']\nurl = {tmp_path}/remote\n")
    return repo


def prepare(
    repo: Path, node: Path, *contents: str, is_current: bool = False, is_recorded: bool = True, is_pushed: bool = True
) -> str:
    """Put a version into DVC's cache, with DVC's record of it, into the remote and into the node's store."""
    folder = repo / "made"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for content in contents:
        (folder / f"{content}.png").write_text(content)
    version = store(folder, repo / ".dvc/cache")
    if is_pushed:
        store(folder, repo.parent / "remote")
    output = {"path": "data/processed/tiny-squares", "md5": f"{version}.dir", "nfiles": len(contents), "size": 1}
    entry = {"cmd": "prepare", "deps": [], "outs": [output]}
    if is_recorded:
        record = repo / f".dvc/cache/runs/ab/{version}/value"
        record.parent.mkdir(parents=True)
        record.write_text(yaml.safe_dump(entry))
    if is_current:
        (repo / "dvc.lock").write_text(yaml.safe_dump({"stages": {"prepare@tiny-squares": entry}}))
    copy = node / "tiny-squares" / version
    copy.mkdir(parents=True)
    (copy / MARKER).touch()
    (node / ".pictures" / version).mkdir(parents=True)
    return version


def run(
    spec: RunSpec, settings: Settings, make_result: Callable[..., RunResult] | None, *, code_hash: str = ""
) -> Path:
    """A run with a checkpoint; finished where `make_result` is given."""
    folder = settings.storage / spec.run_key
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts/weights.safetensors").write_bytes(b"weights")
    code_hash = code_hash or plan_cell(spec, settings).code_hash
    record_attempt(folder, spec, data_source="", code_hash=code_hash)
    save_checkpoint(folder / "checkpoints" / "1", run_key=spec.run_key, step=6, epoch=1, tensors={}, state={})
    if make_result is not None:
        files = hash_files(folder, folder / "artifacts")
        write_result(folder, make_result(spec, 0.25, 0.5, files=files, code_hash=code_hash))
    return folder


def on(spec: RunSpec, version: str) -> RunSpec:
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"version": version})})


def kinds(garbage: list[Garbage]) -> dict[str, list[str]]:
    return {kind: sorted(found.names) for kind, found in by_kind(garbage).items()}


def test_nothing_anywhere_is_no_garbage(settings: Settings, repo: Path, node: Path) -> None:
    assert find_garbage(settings, repo, node) == []
    assert not settings.home.exists()


def test_what_is_needed_survives_and_the_rest_is_freed(
    settings: Settings, repo: Path, node: Path, cell_spec: Callable[..., RunSpec],
    make_result: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trained, registered, current, foreign, half, dropped, other = (
        prepare(repo, node, "shared", "trained"),
        prepare(repo, node, "shared", "registered"),
        prepare(repo, node, "shared", "current", is_current=True),
        prepare(repo, node, "shared", "foreign", is_recorded=False),
        prepare(repo, node, "half"),
        prepare(repo, node, "shared", "dropped", "dropped too"),
        prepare(repo, node, "dropped too", "other"),
    )
    champion = Version(1, "f" * 12, "id", 0, (), {}, {"speck.dataset_version": registered, TRAINING: "f" * 12})
    settings.home.mkdir()
    (settings.home / "mlflow.db").touch()
    monkeypatch.setattr(flows.gc, "connect", lambda _: None)
    monkeypatch.setattr(flows.gc, "all_versions", lambda _: [champion])

    finished, begun = on(cell_spec(), trained), on(cell_spec(seed=1), half).with_warm_start(WARM)
    for weights in (WARM, "sha256:" + "6" * 64):
        path = warm_start_path(settings.storage, weights)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"weights")
    old = run(finished, settings, make_result, code_hash="0ld")
    aside = supersede(old)
    run(finished, settings, make_result)
    half_done = run(begun, settings, None)
    before = [plan_cell(spec, settings).state for spec in (finished, begun)]
    assert before == ["cached", "resume"]
    for leftover in ("data/raw/.x.partial", "data/raw/.x.fixed", "data/processed/.y.old", "data/processed/y"):
        (repo / leftover).mkdir(parents=True)
    (repo / "data/raw/x").symlink_to(repo)
    (repo / "data/raw/.x.old").symlink_to(repo)
    (settings.storage / finished.run_key / "artifacts.partial").mkdir()
    (settings.storage / "scoring-01234567").mkdir()

    garbage = find_garbage(settings, repo, node)
    assert kinds(garbage) == {
        # `foreign` has no record of DVC's: in the cache it is somebody else's, in the store nobody needs it.
        "dataset version in the store": sorted([foreign, dropped, other]),
        "dataset version in DVC's cache": sorted([dropped, other]),
        "warm-start weights": ["6" * 64 + ".safetensors"],
        "checkpoints of a finished run": [finished.run_key],
        "superseded run": [finished.run_key],
        "leftover of a killed import": ["x.fixed", "x.old", "x.partial", "y.old"],
        "leftover of a killed run": ["artifacts.partial", "scoring-01234567"],
    }
    assert free(garbage, settings, repo, node) == garbage
    assert find_garbage(settings, repo, node) == []

    assert [plan_cell(spec, settings).state for spec in (finished, begun)] == before
    assert warm_start_path(settings.storage, WARM).is_file()
    assert (half_done / "checkpoints/1/manifest.json").is_file()
    assert [path.name for path in aside.iterdir()] == ["attempts"], "numbers of attempts are not given away again"
    assert {path.name for path in (node / "tiny-squares").glob("[!.]*")} == {trained, registered, current, half}
    assert {path.name for path in (node / ".pictures").iterdir()} == {trained, registered, current, half}
    left = {path.read_text() for path in (repo / ".dvc/cache/files").rglob("*") if path.is_file()}
    assert left >= {"shared", "trained", "registered", "current", "foreign", "half"}
    assert not left & {"dropped", "dropped too", "other"}


def test_a_superseded_run_that_a_registered_version_came_from_stays(
    settings: Settings, repo: Path, node: Path, cell_spec: Callable[..., RunSpec],
    make_result: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    aside = supersede(run(cell_spec(), settings, make_result))
    (settings.home / "mlflow.db").touch()
    champion = Version(1, aside.name, "id", 0, (), {}, {TRAINING: aside.name})
    monkeypatch.setattr(flows.gc, "connect", lambda _: None)
    monkeypatch.setattr(flows.gc, "all_versions", lambda _: [champion])
    assert find_garbage(settings, repo, node) == []


def test_a_real_registry_is_asked(
    settings: Settings, repo: Path, node: Path, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    """A version that no run on this disk knows stays, because a model that came from it is registered."""
    registered, other = prepare(repo, node, "registered"), prepare(repo, node, "other")
    client = connect(settings.tracking_uri)
    result = make_result(on(cell_spec(), registered), 0.25, 0.5)
    run_id = ensure_run(
        client, experiment="tiny-squares", run_key=result.run_key, training_id=result.run_key, name="x", params={},
        tags={}, dataset=DatasetRef("tiny-squares", registered, "s", {}), start_time_ms=1,
    )  # fmt: skip
    model_folder = settings.home / "model"
    model_folder.mkdir()
    (model_folder / "MLmodel").touch()
    register(
        client, model_name="tiny-squares", run_id=run_id, run_key=result.run_key, model_folder=model_folder,
        tags={DATASET_VERSION: registered, TRAINING: result.run_key}, scores={"coco/AP": 0.5},
    )  # fmt: skip
    garbage = find_garbage(settings, repo, node)
    assert kinds(garbage) == {"dataset version in the store": [other], "dataset version in DVC's cache": [other]}


def test_a_reproduction_goes_when_it_is_finished(settings: Settings, repo: Path, node: Path) -> None:
    for name in ("dots-v1/runs/aaa/result.json", "dots-v2/runs/bbb/attempts/001.json"):
        path = settings.home / "reproduced" / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    garbage = find_garbage(settings, repo, node)
    assert kinds(garbage) == {"finished reproduction": ["dots-v1"]}
    free(garbage, settings, repo, node)
    assert [path.name for path in (settings.home / "reproduced").iterdir()] == ["dots-v2"]


def test_a_damaged_result_keeps_its_checkpoints(
    settings: Settings, repo: Path, node: Path, cell_spec: Callable[..., RunSpec], make_result: Callable[..., RunResult]
) -> None:
    folder = run(cell_spec(), settings, make_result)
    (folder / "artifacts/weights.safetensors").write_bytes(b"damaged")
    assert find_garbage(settings, repo, node) == []


def test_an_unreadable_record_stops_everything(
    settings: Settings, repo: Path, node: Path, cell_spec: Callable[..., RunSpec]
) -> None:
    folder = run(cell_spec(), settings, None)
    (folder / "attempts/001.json").write_text("{}")
    with pytest.raises(UnreadableRecord, match=r"001\.json: cannot be read, so nobody knows what the run needs"):
        find_garbage(settings, repo, node)


def test_nothing_is_freed_while_a_cell_is_worked_on(settings: Settings, repo: Path, node: Path) -> None:
    lease = settings.home / "leases/abc.json"
    lease.parent.mkdir(parents=True)
    lease.touch()
    with pytest.raises(RunsAtWork, match="abc is being worked on"):
        free([], settings, repo, node)
    os.utime(lease, (1, 1))
    assert free([], settings, repo, node) == []


def test_what_is_young_stays(settings: Settings, repo: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.gc, "MIN_AGE_S", 3600.0)
    leftover = repo / "data/raw/.x.partial"
    leftover.mkdir(parents=True)
    (leftover / "image.png").touch()
    for path in (leftover / "image.png", leftover):
        assert find_garbage(settings, repo, node) == []
        os.utime(path, (time.time() - 4000,) * 2)
    assert find_garbage(settings, repo, node) == [], "an old copy has just been put there"
    later_s = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later_s)
    assert kinds(find_garbage(settings, repo, node)) == {"leftover of a killed import": ["x.partial"]}


@pytest.mark.parametrize("folder", ["raw", "processed"])
def test_what_may_be_the_only_copy_stays(settings: Settings, repo: Path, node: Path, folder: str) -> None:
    """A fix that was killed between two renamings takes it up again."""
    old = repo / "data" / folder / ".x.old"
    old.mkdir(parents=True)
    assert find_garbage(settings, repo, node) == []
    (repo / "data" / folder / "x").mkdir()
    garbage = find_garbage(settings, repo, node)
    assert kinds(garbage) == {"leftover of a killed import": ["x.old"]}
    (repo / "data" / folder / "x").rmdir()
    assert not garbage[0].free()
    assert old.is_dir()


@pytest.mark.parametrize(
    ("leftover", "lock"),
    [("data/raw/.x.fixed", ".dvc/tmp/speck-import-x.lock"), ("data/processed/.x.partial", "data/processed/.x.lock")],
)
def test_what_somebody_is_making_stays(settings: Settings, repo: Path, node: Path, leftover: str, lock: str) -> None:
    (repo / leftover).mkdir(parents=True)
    garbage = find_garbage(settings, repo, node)
    with FileLock(repo / lock):
        assert free(garbage, settings, repo, node) == []
    assert free(garbage, settings, repo, node) == garbage
    assert not (repo / leftover).exists()


def test_a_version_that_was_restored_meanwhile_stays(settings: Settings, repo: Path, node: Path) -> None:
    first, second = prepare(repo, node, "first"), prepare(repo, node, "second", is_current=True)
    garbage = find_garbage(settings, repo, node)
    assert {name for names in kinds(garbage).values() for name in names} == {first}
    lock = repo / "dvc.lock"
    lock.write_text(lock.read_text().replace(second, first))
    assert free(garbage, settings, repo, node) == []
    assert (repo / f".dvc/cache/files/md5/{first[:2]}/{first[2:]}.dir").is_file()
    assert (node / "tiny-squares" / first).is_dir()


@pytest.mark.parametrize("remote", ["", "remote", "s3://bucket/dvc"])
def test_a_version_that_no_remote_is_known_to_have_is_freed_only_if_asked(
    settings: Settings, repo: Path, node: Path, monkeypatch: pytest.MonkeyPatch, remote: str
) -> None:
    pushed = prepare(repo, node, "shared", "pushed")
    unpushed = prepare(repo, node, "shared", "unpushed", is_pushed=False)
    config = (repo / ".dvc/config").read_text().replace(f"{repo.parent}/remote", remote)
    if remote != "remote":
        (repo / ".dvc/config").write_text(config if remote else "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("flows.settings.REPO", repo)
    monkeypatch.setattr("data.store.default_root", lambda: node)

    def speck_gc(*options: str) -> list[str]:
        answer = CliRunner().invoke(app, ["gc", *options], catch_exceptions=False)
        assert answer.exit_code == 0
        return answer.stdout.splitlines()

    def left() -> set[str]:
        return {
            path.read_text()
            for path in (repo / ".dvc/cache/files").rglob("*")
            if path.suffix != ".dir" and path.is_file()
        }

    why = {"": "no remote", "remote": "not in the remote", "s3://bucket/dvc": "the remote does not answer"}[remote]
    kept = [unpushed] if remote == "remote" else sorted([pushed, unpushed])
    assert kinds(find_garbage(settings, repo, node))[f"dataset version in DVC's cache, {why}"] == kept
    said = speck_gc("--delete")
    assert f"dataset versions that may have no other copy and stay without --unpushed: {len(kept)}" in said
    assert left() == {"shared", "unpushed"} | ({"pushed"} if len(kept) == 2 else set())
    assert speck_gc("--delete", "--unpushed")[-1].endswith(f"to free, {len(kept)} of {len(kept)} deleted")
    assert left() == set()
    assert speck_gc() == ["nothing: all that is there is needed, or younger than an hour"]


def test_a_file_with_several_names_counts_once_and_only_if_all_go(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_bytes(bytes(100_000))
    os.link(first, second)
    garbage = [Garbage(kind, kind, (path,), lambda: True) for kind, path in (("one", first), ("two", second))]
    assert [found.size_bytes >= 100_000 for found in by_kind(garbage).values()] == [False, True]
    os.link(first, third)
    assert [found.size_bytes for found in by_kind(garbage).values()] == [0, 0]

"""Versions sent to a DVC remote, fetched from it, compared and restored: DVC for real, in a small repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.config import Config
from services.fault_proxy import FaultProxy, fault_proxy
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service
from typer.testing import CliRunner

from data.compare import compare
from data.objects import CorruptObject, MissingObject, SourceUnavailable
from data.remote import NoRemote, PushFailed, cache_folder, pull, push, remote_states
from data.report import LOCK, report_folder
from data.restore import UnknownVersion, UnversionedChanges, known_versions, restore
from data.store import materialise
from data.versioning import VersioningFailed, current_version, one_writer, planned_version, version_dataset
from flows.data_commands import data_app

ROOT = Path(__file__).parents[2]
# Stands for the real preparation: one annotation file per split, one picture per line of the raw list.
PREPARE = """
import json, pathlib
out = pathlib.Path("data/processed/tiny")
(out / "images").mkdir(parents=True, exist_ok=True)
(out / "annotations").mkdir(exist_ok=True)
info = {"num_boxes_clipped": 0, "num_boxes_excluded": 0}
lines = pathlib.Path("data/raw/tiny/list.txt").read_text().split()
for split, names in zip(("train", "val", "test"), (lines[:-2], lines[-2:-1], lines[-1:])):
    images = [{"id": n, "file_name": f"{name}.png", "width": 8, "height": 8, "ignore_regions_xywh": []}
              for n, name in enumerate(names, 1)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, len(name), 2], "iscrowd": 0}
             for n, name in enumerate(names, 1)]
    document = {"info": info, "images": images, "annotations": boxes, "categories": [{"id": 1, "name": "car"}]}
    (out / f"annotations/{split}.json").write_text(json.dumps(document))
    for name in names:
        (out / f"images/{name}.png").write_bytes(name.encode() * 5000)
"""


def dvc(repo: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=repo, check=True, capture_output=True)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with one prepared version of a dataset whose raw data is a list of names."""
    repo = tmp_path / "repo"
    (repo / "data/catalog").mkdir(parents=True)
    (repo / "data/raw/tiny").mkdir(parents=True)
    (repo / ".dvc").mkdir()
    shutil.copyfile(ROOT / ".dvc/config", repo / ".dvc/config")
    (repo / "prepare.py").write_text(PREPARE)
    card = {"name": "tiny", "description": "d", "licence": "l", "format": "coco", "source": "s", "classes": ["car"]}
    (repo / "data/catalog/tiny.yaml").write_text(yaml.safe_dump(card))
    stage = {
        "matrix": {"dataset": ["tiny"]},
        "cmd": "python prepare.py",
        "deps": ["data/raw/${item.dataset}"],
        "outs": ["data/processed/${item.dataset}"],
    }
    (repo / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prepare": stage}}))
    subprocess.run(["git", "init", "--quiet", str(repo)], check=True)
    return repo


def prepare(repo: Path, *names: str) -> str:
    """Make a version of pictures with these names, the last two for val and test."""
    (repo / "data/raw/tiny/list.txt").write_text("\n".join(names))
    return version_dataset("tiny", repo).version


def fresh_clone(repo: Path) -> None:
    """Take away what git does not keep: the cache and the prepared files."""
    for path in (repo / ".dvc/cache", repo / "data/processed"):
        shutil.rmtree(path)


def tree(repo: Path) -> dict[str, bytes]:
    folder = repo / "data/processed/tiny"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_one_with_the_cache(repo: Path) -> bool:
    """Whether each prepared file is another name of an object in DVC's cache."""
    objects = {path.stat().st_ino for path in cache_folder(repo).glob("files/md5/*/*")}
    paths = [path for path in (repo / "data/processed/tiny").rglob("*") if path.is_file()]
    return {path.stat().st_ino for path in paths} <= objects and bool(paths)


def test_a_version_goes_to_a_folder_and_comes_back(repo: Path, tmp_path: Path) -> None:
    version = prepare(repo, "a", "b", "c")
    assert remote_states({"tiny": version}, repo) == ({"tiny": "no remote"}, "")
    with pytest.raises(NoRemote, match=r"there is no DVC remote\. .*`dvc remote add --default"):
        push("tiny", repo)
    dvc(repo, "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    assert remote_states({"tiny": version, "other": None}, repo)[0] == {
        "tiny": "not in the remote",
        "other": "no version",
    }
    assert push("tiny", repo) == version
    assert remote_states({"tiny": version}, repo) == ({"tiny": "in the remote"}, "")
    before, lock = tree(repo), (repo / "dvc.lock").read_bytes()
    assert is_one_with_the_cache(repo), "DVC links, it does not copy"
    fresh_clone(repo)
    dvc(repo, "remote", "modify", "storage", "url", str(tmp_path / "empty"))
    with pytest.raises(PushFailed, match="Prepare it: `dvc repro prepare@tiny`"):
        push("tiny", repo)
    dvc(repo, "remote", "modify", "storage", "url", str(tmp_path / "remote"))
    assert pull("tiny", repo) == version
    assert tree(repo) == before
    assert is_one_with_the_cache(repo)
    assert yaml.safe_load((repo / "dvc.lock").read_bytes()) == yaml.safe_load(lock)
    assert not version_dataset("tiny", repo).regenerated, "DVC finds nothing to do"
    for path in (tmp_path / "remote/files/md5").rglob("*"):
        assert path.is_dir() or not path.samefile(cache_folder(repo) / path.relative_to(tmp_path / "remote"))
    assert all(path.stat().st_mode & 0o222 == 0 for path in (repo / "data/processed/tiny").rglob("*") if path.is_file())


def test_a_clone_without_the_raw_data_uses_what_it_pulled(repo: Path, tmp_path: Path) -> None:
    version = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    push("tiny", repo)
    fresh_clone(repo)
    shutil.rmtree(repo / "data/raw/tiny")
    with pytest.raises(VersioningFailed, match=r"data/raw/tiny is missing, and .* `speck data pull tiny`"):
        version_dataset("tiny", repo)
    pull("tiny", repo)
    found, planned = version_dataset("tiny", repo), planned_version("tiny", repo)
    assert planned is not None
    assert (found.version, found.regenerated, planned.version) == (version, False, version)
    (repo / "data/processed/tiny/images/a.png").unlink()
    with pytest.raises(VersioningFailed, match=r"is not the version of dvc\.lock"):
        version_dataset("tiny", repo)


def test_what_the_remote_lost_is_sent_again(repo: Path, tmp_path: Path) -> None:
    """DVC takes the files for granted where their list is there."""
    version = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    push("tiny", repo)
    before, objects = tree(repo), sorted((tmp_path / "remote/files/md5").glob("*/*"))
    gone, cut, *_ = [path for path in objects if path.suffix != ".dir"]
    gone.unlink()
    cut.chmod(0o644)
    cut.write_bytes(b"")
    assert push("tiny", repo) == version
    fresh_clone(repo)
    assert pull("tiny", repo) == version
    assert tree(repo) == before


def test_who_waits_says_so(repo: Path, caplog: pytest.LogCaptureFixture) -> None:
    with one_writer(repo):
        waiting = threading.Thread(target=lambda: prepare(repo, "a", "b", "c"))
        waiting.start()
        wait_for(lambda: "waiting for another speck or DVC command" in caplog.text)
    waiting.join()
    assert "waiting for another speck or DVC command in this repository" in caplog.text


def test_wrong_bytes_in_the_remote_or_the_cache_never_reach_the_prepared_files(repo: Path, tmp_path: Path) -> None:
    version = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    push("tiny", repo)
    before = tree(repo)
    objects = sorted(path for path in (tmp_path / "remote/files/md5").rglob("*") if path.is_file())
    spoilt = next(path for path in objects if path.suffix != ".dir")
    cached = cache_folder(repo) / spoilt.relative_to(tmp_path / "remote")
    shutil.rmtree(repo / "data/processed")
    cached.chmod(0o644)
    cached.write_bytes(b"wrong")
    cached.chmod(0o444)
    assert pull("tiny", repo) == version
    assert tree(repo) == before
    fresh_clone(repo)
    spoilt.chmod(0o644)
    content = spoilt.read_bytes()
    spoilt.write_bytes(b"wrong")
    with pytest.raises(CorruptObject, match=str(spoilt)):
        pull("tiny", repo)
    assert not (repo / "data/processed").exists()
    assert not (cache_folder(repo) / f"files/md5/{version[:2]}/{version[2:]}.dir").exists()
    spoilt.write_bytes(content)
    pull("tiny", repo)
    assert tree(repo) == before


def test_an_earlier_version_is_compared_and_restored(repo: Path, tmp_path: Path) -> None:
    first = prepare(repo, "a", "b", "c", "d")
    files = tree(repo)
    second = prepare(repo, "a", "bb", "e", "c", "d")
    change = compare("tiny", first[:8], "current", repo)
    assert change.previous == first
    assert {what: count for what, count in change.num_images.items() if count} == {"added": 2, "removed": 1}
    assert change.examples == {"added": ["bb.png", "e.png"], "removed": ["b.png"]}
    assert change.objects_per_class == {"car": (4, 5)}
    assert list(known_versions("tiny", repo)) == [first, second]
    with pytest.raises(
        UnknownVersion, match=rf"'zz' must begin exactly one .*newest first: {second[:12]}, {first[:12]}"
    ):
        restore("tiny", "zz", repo)
    restored = restore("tiny", first[:8], repo)
    assert (restored.version, restored.changed_deps) == (first, ("data/raw/tiny",))
    assert tree(repo) == files
    found = current_version("tiny", repo)
    assert found is not None
    assert found.version == first
    assert {path.name for path in (repo / "data/processed").iterdir()} == {".gitignore", ".tiny.lock", "tiny"}
    (repo / "data/raw/tiny/list.txt").write_text("a\nb\nc\nd")
    assert not version_dataset("tiny", repo).regenerated
    assert restore("tiny", second, repo).version == second


def test_a_version_is_known_by_its_report_too(repo: Path) -> None:
    """What DVC recorded of it is gone; the report, as MLflow keeps it, has the entry."""
    first = prepare(repo, "a", "b", "c")
    files = tree(repo)
    kept = report_folder("tiny", first, repo) / LOCK
    kept.parent.mkdir(parents=True)
    shutil.copyfile(repo / "dvc.lock", kept)
    prepare(repo, "a", "b", "c", "d")
    shutil.rmtree(repo / ".dvc/cache/runs")
    assert restore("tiny", first[:8], repo).version == first
    assert tree(repo) == files


def restoring(version: str, repo: Path, kill_after_s: float | None = None) -> float:
    """Restore in a process of its own and return the seconds since it was ready, or kill it when so many are over."""
    command = (
        "from pathlib import Path; from data.restore import restore; print('go', flush=True); "
        f"restore('tiny', {version!r}, Path({str(repo)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        start_s = time.monotonic()
        if kill_after_s is None:
            assert process.wait() == 0
        else:
            time.sleep(kill_after_s)
            process.kill()
        return time.monotonic() - start_s


@pytest.mark.soak
def test_restoring_survives_kills(repo: Path) -> None:
    """Thirty kills from before the first file to after dvc.lock: there is one version's files, or none, never a mix."""
    versions = [prepare(repo, *(f"{letter}{n}" for n in range(400))) for letter in "ab"]
    trees = []
    for version in versions:
        duration_s = restoring(version, repo)
        trees.append(tree(repo))
    found = Counter[str]()
    for number in range(30):
        target = number % 2
        restoring(versions[target], repo, kill_after_s=duration_s * number / 30)
        left = tree(repo)
        found["none" if not left else ["old", "new"][left == trees[target]] if left in trees else "mixed"] += 1
        assert restore("tiny", versions[target], repo).version == versions[target]
        assert tree(repo) == trees[target]
    print(dict(found))
    assert not found["mixed"]
    assert min(found["old"], found["new"]) > 0, "the kills must cover it"


def test_changes_that_no_version_holds_are_kept(repo: Path, tmp_path: Path) -> None:
    first = prepare(repo, "a", "b", "c")
    second = prepare(repo, "a", "b", "c", "d")
    own = repo / "data/processed/tiny/own.txt"
    own.write_text("by hand")
    with pytest.raises(UnversionedChanges, match=r"data/processed/tiny: .*would be lost\. .*`dvc commit -f"):
        restore("tiny", first, repo)
    assert own.read_text() == "by hand"
    own.unlink()
    # Killed between the files and dvc.lock: the files are a version's, so it just goes on.
    lock = (repo / "dvc.lock").read_bytes()
    restore("tiny", first, repo)
    (repo / "dvc.lock").write_bytes(lock)
    assert restore("tiny", second, repo).version == second
    assert restore("tiny", first, repo).version == first


def test_a_version_that_only_the_remote_has_is_fetched(repo: Path, tmp_path: Path) -> None:
    first = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    push("tiny", repo)
    files = tree(repo)
    prepare(repo, "a", "b", "c", "d")
    remote = (tmp_path / "remote/files/md5").rglob("*")
    for path in remote:
        if path.is_file():
            (cache_folder(repo) / path.relative_to(tmp_path / "remote")).unlink()
    with pytest.raises(UnversionedChanges):
        restore("tiny", first, repo)
    shutil.rmtree(repo / "data/processed/tiny")
    restore("tiny", first, repo)
    assert tree(repo) == files
    shutil.rmtree(repo / ".dvc/cache/files")
    shutil.rmtree(repo / "data/processed/tiny")
    dvc(repo, "remote", "remove", "storage")
    with pytest.raises(MissingObject, match="not in this source"):
        restore("tiny", first, repo)


def test_the_commands(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.settings.REPO", repo)
    first = prepare(repo, "a", "b", "c")
    second = prepare(repo, "aa", "b", "c")

    def speck(*arguments: str, exit_code: int = 0) -> str:
        answer = CliRunner().invoke(data_app, arguments, catch_exceptions=False)
        assert answer.exit_code == exit_code
        return answer.stdout

    assert speck("diff", "tiny", first[:6], "current").splitlines() == [
        "images added             1  aa.png",
        "images removed           1  a.png",
        "images relabelled        0",
        "images replaced          0",
        "images moved             0",
        "boxes  car                         3 -> 3        +0",
    ]
    assert json.loads(speck("list", "--json"))[0]["remote"] == "no remote"
    dvc(repo, "remote", "add", "--default", "storage", str(tmp_path / "remote"))
    assert speck("push") == f"tiny: version {second} is in the remote\n"
    assert speck("list").rstrip().endswith("in the remote")
    fresh_clone(repo)
    assert speck("push") == "", "there is nothing here"
    assert speck("pull", "absent", "tiny", exit_code=1) == f"tiny: data/processed/tiny holds version {second}\n"
    assert speck("pull") == f"tiny: data/processed/tiny holds version {second}\n"
    first = prepare(repo, "a", "b", "c")
    said = speck("restore", "tiny", second)
    assert f"hold version {second}" in said
    assert said.rstrip().endswith("leads away from it again: data/raw/tiny")


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of an S3 server with the bucket `drone`."""
    (tmp_path / "served").mkdir()
    with s3_service(tmp_path / "served") as service, fault_proxy(int(service.url.rpartition(":")[2])) as proxy:
        for name, value in (service.environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        client = boto3.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
        client.create_bucket(Bucket="drone")
        yield proxy


@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_a_killed_pull_shows_nothing_and_is_taken_up(repo: Path, proxy: FaultProxy) -> None:
    version = prepare(repo, *(f"picture{number}" for number in range(60)))
    before, listed = tree(repo), cache_folder(repo) / f"files/md5/{version[:2]}/{version[2:]}.dir"
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    push("tiny", repo)
    fresh_clone(repo)
    proxy.delay_s = 0.1
    pulling = f"from pathlib import Path; from data.remote import pull; pull('tiny', Path({str(repo)!r}))"
    with subprocess.Popen([sys.executable, "-c", pulling], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while len(list(listed.parents[1].glob("*/*"))) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    num_fetched = len(list(listed.parents[1].glob("*/*")))
    assert 20 <= num_fetched < 60
    assert not listed.exists()
    assert not (repo / "data/processed/tiny").exists()
    proxy.delay_s = 0.0
    proxy.requests.clear()
    assert pull("tiny", repo) == version
    assert tree(repo) == before
    fetched = sum("/files/md5/" in path and path[-4:] != ".dir" for _, path in proxy.requests.elements())
    assert fetched <= 63 - num_fetched, "what had arrived is not fetched again"


@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_a_server_that_dies_during_a_push_ends_it(
    repo: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC itself waits for ever; what arrived is taken up by the next push."""
    monkeypatch.setattr("data.versioning.WATCH_S", 2.0)
    prepare(repo, *(f"picture{number}" for number in range(60)))
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    proxy.delay_s = 0.2
    closing = threading.Thread(target=lambda: (wait_for(lambda: num_put(proxy) > 10), proxy.close()))
    closing.start()
    with pytest.raises(SourceUnavailable, match=rf"{proxy.url}: "):
        push("tiny", repo)
    closing.join()


def num_put(proxy: FaultProxy) -> int:
    return sum(count for (method, path), count in proxy.requests.items() if method == "PUT" and "/files/md5/" in path)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


def no_secret(message: str) -> None:
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message


@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_wrong_credentials_say_so_and_lose_nothing(
    repo: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    before = tree(repo)
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-secret")
        for command in (push, pull):
            with pytest.raises(SourceUnavailable, match=r"SignatureDoesNotMatch.*the credentials") as caught:
                command("tiny", repo)
            no_secret(str(caught.value))
        states, why = remote_states({"tiny": version}, repo)
        assert states == {"tiny": "the remote does not answer"}
        no_secret(why)
    assert tree(repo) == before
    assert remote_states({"tiny": version}, repo)[0] == {"tiny": "not in the remote"}
    assert push("tiny", repo) == version


@pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)
def test_s3_with_failing_requests_and_a_server_that_goes(repo: Path, tmp_path: Path, proxy: FaultProxy) -> None:
    version = prepare(repo, *(f"picture{number}" for number in range(30)))
    before = tree(repo)
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    proxy.failing_share = 0.2
    assert push("tiny", repo) == version
    assert remote_states({"tiny": version}, repo) == ({"tiny": "in the remote"}, "")
    folder = materialise("tiny", version, source="s3://drone/dvc", root=tmp_path / "node")
    assert len(json.loads((folder / "annotations/train.json").read_bytes())["images"]) == 28
    fresh_clone(repo)
    assert pull("tiny", repo) == version
    assert tree(repo) == before
    proxy.is_skewed = True
    with pytest.raises(SourceUnavailable, match=rf"s3://drone/dvc: {proxy.url}: .*Set this machine's clock"):
        push("tiny", repo)
    proxy.close()
    with pytest.raises(SourceUnavailable, match=rf"{proxy.url}: Could not connect.*Check AWS_ENDPOINT_URL"):
        pull("tiny", repo)
    states, why = remote_states({"tiny": version}, repo)
    assert states == {"tiny": "the remote does not answer"}
    assert proxy.url in why
    assert tree(repo) == before

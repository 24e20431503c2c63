"""Versions sent to a DVC remote, fetched from it, compared and restored: DVC for real, in a small repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from services.tiny_repo import ROOT, dvc, fresh_clone, is_one_with_the_cache, prepare, tiny_repo, tree, wait_for
from typer.testing import CliRunner

from data.compare import compare
from data.objects import CorruptObject, MissingObject
from data.remote import NoRemote, PushFailed, cache_folder, pull, push, remote_states
from data.report import LOCK, report_folder
from data.restore import UnknownVersion, UnversionedChanges, known_versions, restore
from data.versioning import VersioningFailed, current_version, one_writer, planned_version, version_dataset
from flows.data_commands import data_app


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with the dataset `tiny`, not prepared yet."""
    return tiny_repo(tmp_path)


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

"""What is kept of the code and the data of an attempt, from real repositories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import flows.provenance
from flows.provenance import MAX_DIFF_BYTES, data_lock, dirty_diff, provenance, record_sources
from training.records import record_attempt
from training.spec import RunSpec

LOCK = {
    "schema": "2.0",
    "stages": {
        f"prepare@{name}": {
            "cmd": f"prepare {name}",
            "outs": [{"path": f"data/processed/{name}", "hash": "md5", "md5": md5, "size": 9, "nfiles": 3}],
        }
        for name, md5 in (("tiny-squares", f"{'0' * 32}.dir"), ("other", f"{'1' * 32}.dir"))
    },
}
SECRET = (".env", "deploy/server.PEM", "my_key.json", "Secrets/database.txt", "deploy/id_ed25519")


def git(repo: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "somebody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(repo), *arguments], env=os.environ | names, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in which nothing has changed."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / ".gitignore").write_text("ignored.txt\n")
    for name in ("loop.py", *SECRET):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("first\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(flows.provenance, "REPO", folder)
    return folder


def test_a_clean_tree_has_no_diff(repo: Path) -> None:
    (repo / "ignored.txt").write_text("password")
    assert dirty_diff() == ""
    assert provenance()["speck.dirty"] == "False"


def test_the_diff_rebuilds_the_tree_from_the_commit(repo: Path, tmp_path: Path) -> None:
    (repo / "loop.py").write_text("second\n")
    (repo / "new.py").write_text("staged\n")
    git(repo, "add", "new.py")
    (repo / "notes.txt").write_text("secret of nobody's concern")
    diff = dirty_diff()
    assert diff.endswith("# untracked: notes.txt\n")
    assert "nobody's concern" not in diff
    git(tmp_path, "clone", "--quiet", str(repo), "clone")
    (tmp_path / "dirty.diff").write_text(diff)
    git(tmp_path / "clone", "apply", str(tmp_path / "dirty.diff"))
    assert [(tmp_path / "clone" / name).read_text() for name in ("loop.py", "new.py")] == ["second\n", "staged\n"]


def test_no_secret_gets_into_it(repo: Path) -> None:
    for name in (*SECRET, "ignored.txt"):
        (repo / name).write_text("hunter2\n")
    (repo / "loop.py").write_text('URL = "https://user:hunter2@example.org/x"\n')
    diff = dirty_diff()
    assert "hunter2" not in diff
    assert "https://***@example.org/x" in diff
    for name in SECRET:
        assert f"# left out, for its name is like a secret's: {name}\n" in diff
    assert "ignored.txt" not in diff


def test_what_is_too_long_is_cut_and_that_is_said(repo: Path) -> None:
    (repo / "loop.py").write_text("é" * MAX_DIFF_BYTES)
    for index in range(1002):
        (repo / f"{index:04d}.txt").touch()
    lines = dirty_diff().splitlines()
    (cut,) = [line for line in lines if line.startswith("# cut: ")]
    assert int(cut.split()[2]) > 2 * MAX_DIFF_BYTES
    assert lines[-1] == "# untracked: 2 more"
    assert len(dirty_diff().encode()) < MAX_DIFF_BYTES + 50_000


def test_without_git_or_a_commit_there_is_no_diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.provenance, "REPO", tmp_path)
    assert dirty_diff() == ""
    git(tmp_path, "init", "--quiet")
    assert dirty_diff() == ""
    monkeypatch.setenv("PATH", "")
    assert dirty_diff() == ""


def test_the_entry_of_the_data_s_version_is_kept_and_no_other_s(
    repo: Path, tiny_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = tiny_spec()
    assert data_lock(spec.dataset) == "", "there is no dvc.lock"
    (repo / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    assert data_lock(spec.dataset) == "", "it is of another version"
    dataset = spec.dataset.model_copy(update={"version": "0" * 32})
    spec = spec.model_copy(update={"dataset": dataset})
    expected = {"schema": "2.0", "stages": {"prepare@tiny-squares": LOCK["stages"]["prepare@tiny-squares"]}}
    assert yaml.safe_load(data_lock(dataset)) == expected
    attempt = record_attempt(tmp_path / "run", spec, data_source="", code_hash="c")
    assert record_sources(tmp_path / "run", attempt) == ["attempts/001/dirty.diff", "attempts/001/dvc.lock"]
    assert (tmp_path / "run/attempts/001/dirty.diff").read_text() == "# untracked: dvc.lock\n"
    (repo / "dvc.lock").write_text("stages: [")
    assert data_lock(dataset) == "", "a damaged one stops no training"


def test_the_commit_is_kept_and_whether_the_tree_differs(repo: Path) -> None:
    clean = provenance()
    assert clean["mlflow.source.git.commit"] == git(repo, "rev-parse", "HEAD").strip()
    (repo / "loop.py").write_text("second\n")
    assert provenance() == clean | {"speck.dirty": "True"}


def test_a_machine_without_git_or_user_name_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container often has neither: no git, and a user id without an entry in the list of users."""
    monkeypatch.setenv("PATH", "")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_123)
    found = provenance()
    assert (found["mlflow.source.git.commit"], found["speck.dirty"]) == ("unknown", "unknown")
    assert found["mlflow.user"] == "4000000123"

"""What can be told without running DVC; the rest is in tests/integration/test_remote.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import store
from filelock import FileLock, Timeout

from data.restore import UnknownVersion, restore

Make = Callable[..., Path]


def test_a_restore_and_a_preparation_take_turns(
    tmp_path: Path, make_repo: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both use the same hidden folders; a plain `dvc repro` holds this lock alone."""
    repo = make_repo()
    (tmp_path / "made").mkdir()
    (tmp_path / "made/a.png").write_bytes(b"a")
    version = store(tmp_path / "made", repo / ".dvc/cache")
    output = {"path": "data/processed/tiny", "md5": f"{version}.dir", "nfiles": 1, "size": 1}
    (repo / "dvc.lock").write_text(yaml.safe_dump({"stages": {"prepare@tiny": {"outs": [output]}}}))
    monkeypatch.setattr("data.restore._changed_deps", lambda *_: ())
    monkeypatch.setattr("data.prepare.FileLock", partial(FileLock, timeout=0))
    others = repo / "data/processed/.tiny.partial"
    others.mkdir(parents=True)
    with FileLock(repo / "data/processed/.tiny.lock"), pytest.raises(Timeout):
        restore("tiny", version, repo)
    assert others.is_dir()
    assert restore("tiny", version, repo).version == version
    assert (repo / "data/processed/tiny/a.png").read_bytes() == b"a"
    assert not others.exists()


def test_an_unknown_version_names_the_way_through_a_report(make_repo: Make) -> None:
    with pytest.raises(
        UnknownVersion, match=r"MLflow .*artifact data/tiny/dvc\.lock into data/reports/tiny/<version>/"
    ):
        restore("tiny", "zz", make_repo())

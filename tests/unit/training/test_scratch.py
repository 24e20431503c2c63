"""What a process keeps on its node's disk while it lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from training.scratch import scratch_folder

ROOT = Path(__file__).parents[3]
HOLDING = """
import time
from training.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "checkpoint").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDING], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with scratch_folder() as mine:
            assert mine != theirs
            assert (theirs / "checkpoint").is_file()
        assert not mine.exists()
        process.kill()
    with scratch_folder():
        assert not theirs.exists()


def test_an_error_leaves_nothing(temporary: Path) -> None:
    with pytest.raises(KeyError), scratch_folder():
        raise KeyError
    assert list(temporary.iterdir()) == []

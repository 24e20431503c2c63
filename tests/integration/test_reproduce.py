"""`speck reproduce` of what `speck train` registered, as a user types both, after the code has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos.pipeline import NUM_EPOCHS, Pipeline, make_pipeline

pytestmark = pytest.mark.soak


def head_of(repo: Path) -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def reproduce(pipeline: Pipeline) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `speck reproduce sample-aerial@1 --json`."""
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ} | {
        "HOME": str(pipeline.home.parent),
        "PYTHONPATH": str(pipeline.repo),
        "SPECK_HOME": str(pipeline.home),
        "SPECK_STORE": str(pipeline.home / "store"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "flows", "reproduce", "sample-aerial@1", "--json"],
        cwd=pipeline.repo, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_registered_version_trains_again_by_its_commit_and_comes_out_bit_by_bit(tmp_path: Path) -> None:
    pipeline = make_pipeline(tmp_path)
    head = head_of(pipeline.repo)
    run = pipeline.start()
    assert run.wait(300) == 0, run.output
    before = (pipeline.run_folder / "result.json").read_bytes()

    optimizer = pipeline.repo / "training" / "optimizer.py"
    optimizer.write_text(optimizer.read_text() + "\nCHANGED_SINCE = True\n")
    code, stdout, stderr = reproduce(pipeline)
    assert code == 0, stderr
    assert f"commit {head[:12]}" in stderr
    found: dict[str, Any] = json.loads(stdout)
    assert found["is_identical"]
    assert found["weights"]["num_different"] == 0
    assert found["weights"]["num_tensors"] > 100
    assert len(found["losses"]) == NUM_EPOCHS
    assert all(old is not None and old == new for old, new in found["losses"].values())
    assert {"val/coco/AP", "test/coco/AP", "test/coco/AP50"} <= found["scores"].keys()
    assert all(old == new for old, new in found["scores"].values())
    # Trained once more, elsewhere.
    assert (pipeline.run_folder / "result.json").read_bytes() == before
    again = Path(found["run_folder"])
    assert again.is_relative_to(pipeline.home / "reproduced")
    first, second = (json.loads((folder / "result.json").read_bytes()) for folder in (pipeline.run_folder, again))
    assert second["finished_ms"] > first["finished_ms"]
    assert second["code_hash"] == first["code_hash"]

    # Without its data nothing begins.
    shutil.rmtree(pipeline.repo / ".dvc" / "cache")
    shutil.rmtree(pipeline.home / "store")
    code, stdout, stderr = reproduce(pipeline)
    assert (code, stdout) == (1, "")
    assert "is not to be had" in stderr
    assert (again / "result.json").exists(), "the last reproduction stays until another begins"

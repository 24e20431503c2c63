"""`dvc.lock` is of the code that lies here: else the first `make train-all` of a clone would change it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]


def test_the_lock_was_written_by_this_code() -> None:
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    locked = {dependency["path"]: dependency["md5"] for stage in stages.values() for dependency in stage["deps"]}
    code = {path: md5 for path, md5 in locked.items() if path.endswith(".py")}
    assert len(code) > 5
    changed = [path for path, md5 in code.items() if hashlib.md5((ROOT / path).read_bytes()).hexdigest() != md5]
    assert changed == [], "say `dvc repro`, and commit dvc.lock"

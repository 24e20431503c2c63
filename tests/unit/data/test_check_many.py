"""`check` of 10,000 pictures: what it finds, and memory that hardly grows with their number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

SCRIPT = """
import resource, sys
from pathlib import Path
from data.checking import check
for problem in check("tiny", Path(sys.argv[1])):
    print(problem)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_yolo(folder: Path, number: int) -> Path:
    """Every hundredth picture is a PNG called .jpg, and the last one is cut off."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
    (folder / "data.names").write_text("car\n")
    for index in range(number):
        path = folder / ("val" if index % 10 == 1 else "test" if index % 10 == 2 else "train") / f"{index:05}.jpg"
        suffix = ".jpg" if index % 100 else ".png"
        path.write_bytes(cv2.imencode(suffix, rng.integers(0, 256, (48, 64), np.uint8))[1].tobytes())
        path.with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.2\n0 0.3 0.3 0.2 0.2\n")
    path.write_bytes(path.read_bytes()[:-50])
    return folder


def checked(repo: Path) -> tuple[list[str], int]:
    """Return the problems that a process of its own finds, and its largest resident size in MiB."""
    command = [sys.executable, "-c", SCRIPT, str(repo)]
    root = Path(__file__).parents[3]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return found[:-1], int(found[-1])


@pytest.mark.soak
def test_ten_thousand_pictures_take_little_more_memory_than_five_hundred(
    tmp_path: Path, make_repo: Callable[..., Path]
) -> None:
    """A picture costs a thumbnail of 1.2 kB for its likeness, and its records: the pixels do not stay."""
    sizes_mib = {}
    for number in (500, 10_000):
        repo = make_repo(write_yolo(tmp_path / str(number), number), classes=("car",), format="yolo")
        found, sizes_mib[number] = checked(repo)
        assert sum("the suffix '.jpg' is wrong" in problem for problem in found) == number // 100
        assert sum("cannot be decoded" in problem for problem in found) == 1
        assert sum(": error: " in problem for problem in found) == 1
        repo.rename(tmp_path / f"repo-{number}")
    assert sizes_mib[10_000] - sizes_mib[500] < 100

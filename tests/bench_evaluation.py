"""The evaluation's part of `make bench`: against pycocotools, on a set as large and as crowded as VisDrone's val."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from evaluation.analysis import analyse
from evaluation.coco import score
from evaluation.protocols import score_by
from evaluation.samples import samples_by
from evaluation.significance import compare
from evaluation.tables import tabulate
from tests.scenes import crowded_set

VISDRONE_VAL = (548, 38_000, 270_000)
LARGE = (5000, 40_000, 500_000)
REPEATS = 3


def evaluation_against_pycocotools() -> None:
    """One run of pycocotools, which takes most of a minute, against medians of everything else."""
    truth, found = crowded_set(*VISDRONE_VAL)
    tables = tabulate(truth, found)
    shaken = np.random.default_rng(1).normal(0, 0.05, len(found))
    other = [
        {**row, "score": float(np.clip(row["score"] + noise, 0, 1))} for row, noise in zip(found, shaken, strict=True)
    ]
    sizes = f"{VISDRONE_VAL[0]} images, {VISDRONE_VAL[1]} objects, {VISDRONE_VAL[2]} detections"
    reference = _seconds(lambda: score(truth, found, max_dets=500, ignore_rule="none"), repeats=1)
    print(f"{sizes}: pycocotools {reference:.1f} s, against", flush=True)
    parts: dict[str, Callable[[], object]] = {
        "the same numbers, as validation while training": lambda: score(
            truth, found, max_dets=500, ignore_rule="none", by_pycocotools=False
        ),
        "the VisDrone protocol": lambda: score_by("visdrone", tables),
        "the analysis": lambda: analyse(tables, ignore_rule="none", max_dets=500, chosen_on="val"),
    }
    for name, action in parts.items():
        seconds = _seconds(action)
        print(f"    {name}: {seconds:.2f} s = 1/{reference / seconds:.0f}", flush=True)
    sample = partial(samples_by, "coco", max_dets=500, ignore_rule="none")
    seconds = _seconds(lambda: compare(tables, tabulate(truth, other), sample, num_samples=1000), repeats=1)
    print(f"    1,000 bootstrap samples of two runs: {seconds:.1f} s", flush=True)


def memory_of_a_large_set() -> None:
    """Peak memory of a process of its own that scores and analyses 500,000 detections, pycocotools included."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench_evaluation"], check=True, capture_output=True, text=True, cwd="."
    )
    print(done.stdout.strip(), flush=True)


def _score_large() -> None:
    truth, found = crowded_set(*LARGE)
    before = _peak_mib()
    tables = tabulate(truth, found)
    score_by("coco", tables, max_dets=500)
    score_by("visdrone", tables)
    analyse(tables, ignore_rule="none", max_dets=500, chosen_on="val")
    print(
        f"{LARGE[0]} images, {LARGE[2]} detections, scored by COCO and VisDrone and analysed: peak {_peak_mib():.0f} "
        f"MiB, of which the files' content {before:.0f} MiB"
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _seconds(action: Callable[[], object], repeats: int = REPEATS) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    _score_large()

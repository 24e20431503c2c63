"""The driver of one cell inside the cluster: `python -m training.job RUN_FOLDER ATTEMPT`.

It places the workers and starts them again after failures; all records are theirs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from training.launch import build_trainer, causes_told
from training.records import read_attempt


def main(run_folder: Path, number: int) -> None:
    """Train, score and record one attempt."""
    attempt = read_attempt(run_folder, number)
    with causes_told():
        ray.init(log_to_driver=True, configure_logging=False)
        build_trainer(attempt, run_folder, accumulation=attempt.spec.training.accumulation).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

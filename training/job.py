"""The driver of one cell inside the cluster: `python -m training.job RUN_FOLDER ATTEMPT`.

Writes `result.json` last, when all that it names lies in the run folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import ray

from evaluation.result import ScoreResult
from training.checkpoint import NUM_CHECKPOINTS_KEPT, newest_first
from training.launch import build_trainer, causes_told
from training.records import RunResult, hash_files, read_attempt, write_result


def main(run_folder: Path, number: int) -> None:
    """Train, score and record one attempt."""
    started = time.monotonic()
    attempt = read_attempt(run_folder, number)
    # Ray writes its list of checkpoints in place, and refuses to start from one that a kill cut short.
    # Nothing is lost: the workers find checkpoints by their manifests.
    (run_folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    with causes_told():
        ray.init(log_to_driver=True, configure_logging=False)
        build_trainer(attempt, run_folder).fit()
    for folder in list(newest_first(run_folder))[NUM_CHECKPOINTS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
    artifacts = run_folder / "artifacts"
    seconds: dict[str, float] = json.loads((artifacts / "seconds.json").read_bytes())
    seconds["job"] = time.monotonic() - started
    result = RunResult(
        run_key=attempt.run_key,
        spec=attempt.spec,
        scores={
            split: ScoreResult.model_validate_json((artifacts / f"score_{split}.json").read_bytes())
            for split in ("val", "test")
        },
        files=hash_files(run_folder, artifacts),
        attempts=number,
        seconds=seconds,
        code_hash=attempt.code_hash,
        finished_ms=time.time_ns() // 1_000_000,
    )
    write_result(run_folder, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

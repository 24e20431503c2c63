"""The same run without Ray: `torchrun --nproc-per-node N -m training.loop SPEC` on every machine of a group.

SPEC is the JSON file of a RunSpec, as `speck plan --specs FOLDER` writes it. The records are those of a Ray job: a run
that was finished here is one that `speck train-all` finds finished, if it lies where that looks.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import models
from training.code import training_code_hash
from training.errors import Preempted, Stopped
from training.records import RESULT, Attempt, record_attempt
from training.requests import leave_on_sigterm
from training.run import run_attempt
from training.say import say_line
from training.spec import RunSpec
from training.store import open_store
from training.workers import Workers


def main() -> None:
    """Train, score and record one attempt; exit code 0 as well where it was asked to stop early."""
    arguments = _arguments()
    spec = RunSpec.model_validate_json(arguments.spec.read_bytes())
    workers = Workers.join(spec.compute, int(os.environ.get("LOCAL_RANK", "0")))
    run_folder: Path = arguments.runs / spec.run_key
    try:
        if workers.broadcast((run_folder / RESULT).is_file()):
            _say(workers, f"{run_folder / RESULT} is there: the run is done")
            return
        attempt: Attempt = workers.broadcast(_record(run_folder, spec, arguments.data) if workers.rank == 0 else None)
        leave_on_sigterm()
        # Ctrl-C reaches every process of a terminal.
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))
        run_attempt(attempt, open_store(str(run_folder)), workers, accumulation=spec.training.accumulation)
        _say(workers, f"the result lies in {run_folder}")
    except (Preempted, Stopped) as told:
        _say(workers, f"{told}; run the same again to go on from there")
    finally:
        workers.leave()


def _record(run_folder: Path, spec: RunSpec, data_source: str) -> Attempt:
    module = models.ARCHITECTURES[spec.architecture.name].build.__module__
    code_hash = training_code_hash(Path(__file__).parents[1], module)
    return record_attempt(run_folder, spec, data_source=data_source, code_hash=code_hash)


def _arguments() -> argparse.Namespace:
    home = Path(os.environ.get("SPECK_HOME", ".speck"))
    parser = argparse.ArgumentParser(prog="training.loop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", type=Path, metavar="SPEC", help="RunSpec as JSON")
    parser.add_argument("--runs", type=Path, default=home / "runs", help="folder of all runs, seen by all machines")
    parser.add_argument(
        "--data",
        default=os.environ.get("SPECK_DATA_SOURCE", ".dvc/cache"),
        help="DVC storage with the dataset version: a folder or s3://bucket/prefix",
    )
    return parser.parse_args()


def _say(workers: Workers, message: str) -> None:
    if workers.rank == 0:
        say_line(message)

"""The driver of one cell inside the cluster: `python -m training.job RUN ATTEMPT`.

RUN is the address of the run's records, a folder or `s3://bucket/prefix`. The driver places the workers and starts them
again after failures; all records are theirs.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.train import TrainingFailedError

from training.launch import build_trainer, causes_told, see_nodes_anew
from training.records import Attempt, read_attempt
from training.requests import stop_name
from training.retry import Failure, GiveUp, classify, decide
from training.say import say_line
from training.store import RunStore, open_store

# A little less than what `training.cluster` has Ray wait before it kills.
STOP_PATIENCE_S = 12.0


def main(run_url: str, number: int) -> None:
    """Train, score and record one attempt."""
    with causes_told(), tempfile.TemporaryDirectory(prefix="speck-ray-") as folder:
        store = open_store(run_url)
        attempt = read_attempt(store, number)
        ray.init(log_to_driver=True, configure_logging=False)
        train(attempt, store.url, Path(folder), stop_on_sigterm(store, number))


def stop_on_sigterm(store: RunStore, number: int) -> threading.Event:
    """From now on SIGTERM, which ends a Ray job, asks the workers to keep a checkpoint and end, and then ends this.

    Returns what is set by then.
    """
    asked = threading.Event()

    def ask(*_: object) -> None:
        if asked.is_set():
            return
        asked.set()
        say_line("asked to stop")
        # Without workers, or where they take too long, nobody else ends this.
        ending = threading.Timer(STOP_PATIENCE_S, os._exit, (128 + signal.SIGTERM,))
        ending.daemon = True
        ending.start()
        store.write(stop_name(number), b"")

    # Ray has set one that exits at once.
    signal.signal(signal.SIGTERM, ask)
    return asked


def train(attempt: Attempt, run_url: str, ray_folder: Path, stopping: threading.Event) -> None:
    """Keep workers at it until they are done. Raises TrainingFailedError as soon as there is no use in going on."""
    accumulation = attempt.spec.training.accumulation
    history: list[Failure] = []
    while True:
        started = time.monotonic()
        try:
            build_trainer(attempt, run_url, ray_folder, accumulation=accumulation).fit()
            return
        except TrainingFailedError as error:
            history.append(classify(error, time.monotonic() - started))
            decision = decide(history, attempt.spec)
            if stopping.is_set():
                raise
            if isinstance(decision, GiveUp):
                error.add_note(decision.told)
                raise
        say_line(history[-1].cause)
        say_line(decision.told)
        time.sleep(decision.pause_s)
        see_nodes_anew()
        accumulation = decision.accumulation


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

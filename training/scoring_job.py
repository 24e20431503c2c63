"""Detecting on a split with several workers: `python -m training.scoring_job FOLDER` inside the cluster.

FOLDER, on shared storage, holds the order and the weights. What was detected is written there, last and whole.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train

from data.store import on_this_node
from data.whole_file import write_whole
from training.launch import causes_told, on_workers
from training.say import say_line
from training.scoring import DETECTED, SHARE_MARK, detect_split, load_model, read_ground_truth, read_order, split_inputs
from training.worker import join_workers

NEWS_EVERY_S = 2.0


def main(folder: Path) -> None:
    """Start the workers and wait for them."""
    with causes_told():
        compute = read_order(folder).spec.compute
        ray.init(log_to_driver=True, configure_logging=False)
        on_workers(score_worker, {"folder": str(folder)}, compute, folder).fit()


def score_worker(config: dict[str, Any]) -> None:
    """Entry point on every worker; rank 0 writes what all of them detected."""
    folder = Path(config["folder"])
    order = read_order(folder)
    spec = order.spec
    workers = join_workers(spec.compute)
    dataset_folder = on_this_node(spec.dataset.name, spec.dataset.version, order.data_source)
    model = load_model(spec, folder / "weights.safetensors").to(workers.device)
    told = -NEWS_EVERY_S

    def tell(num_done: int) -> None:
        nonlocal told
        if time.monotonic() - told >= NEWS_EVERY_S:
            told = time.monotonic()
            say_line(f"{SHARE_MARK} {workers.rank} {num_done}")

    tell(0)
    inputs, ground_truth = (
        split_inputs(spec, dataset_folder, order.split),
        read_ground_truth(dataset_folder, order.split),
    )
    detected = detect_split(spec, model, inputs, workers, tell, ground_truth=ground_truth)
    if detected is not None:
        write_whole(folder / DETECTED, json.dumps(detected._asdict(), allow_nan=False))
    workers.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

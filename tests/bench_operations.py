"""`make bench`: what orchestration costs beside training, and how long it takes to find that there is nothing to do."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from chaos.pipeline import EXPERIMENT, Pipeline, make_pipeline
from services.prefect_server import prefect_service

from flows.experiment import load_experiment
from flows.plan import plan_cells
from flows.settings import Settings
from flows.warm_start import specs_of

RETRAIN = "import sys; from flows.retrain import retrain; retrain(experiment=sys.argv[1])"


def operations_benches() -> None:
    """Print all of them; the servers and the cluster are real."""
    with tempfile.TemporaryDirectory(prefix="speck-bench-") as name:
        os.environ["SPECK_STORE"] = f"{name}/store"
        planning(Path(name) / "planning")
        pipeline = make_pipeline(Path(name))
        (pipeline.repo / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"seeds": [0, 1, 2]}))
        tax_of_cells(pipeline)
        nothing_to_do(pipeline, Path(name))


def planning(home: Path, num_seeds: int = 25) -> None:
    """Plan the default matrix with many seeds, first with a probe of each kind of cell, and then as from then on."""
    experiment, settings = load_experiment(seeds=range(num_seeds)), Settings(home=home)
    for what in ("with a probe of each kind", "once every kind is known"):
        started = time.perf_counter()
        specs = [spec for dataset in experiment.datasets for spec in specs_of(experiment, dataset, "0" * 32, settings)]
        plan_cells(specs, settings)
        print(f"plan of {len(specs)} cells, {what}: {time.perf_counter() - started:.1f} s", flush=True)


def tax_of_cells(pipeline: Pipeline) -> None:
    """Of cells on an embedded cluster, one after the other: the seconds that are neither training nor scoring."""
    run = pipeline.start("train-all")
    run.wait(900)
    found = re.findall(r"wall ([0-9.]+) s, .* overhead ([0-9.]+) s", run.output)
    walls, taxes = ([float(value) for value in column] for column in zip(*found, strict=True))
    wall_s, tax_s = statistics.median(walls), statistics.median(taxes)
    print(f"orchestration of each of {len(found)} embedded cells: {tax_s:.1f} s of {wall_s:.1f} s", flush=True)


def nothing_to_do(pipeline: Pipeline, folder: Path) -> None:
    """The process of a `retrain` that finds everything unchanged, as a worker starts it."""
    with prefect_service(folder) as service:
        home = {"SPECK_HOME": str(pipeline.home), "SPECK_STORE": str(pipeline.home / "store")}
        environment = os.environ | service.environment | home | {"PYTHONPATH": str(pipeline.repo)}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", RETRAIN, str(pipeline.repo / "experiment.yaml")],
            cwd=pipeline.repo, env=environment, capture_output=True, text=True, check=True, timeout=600,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    told = "Unchanged" if "Unchanged" in done.stdout + done.stderr else "something was done!"
    print(f"retrain without a change, from the start of its process: {seconds:.1f} s ({told})", flush=True)

"""The training's part of `make bench`: what the loop adds to a network, Ray Train against torchrun, one worker and two.

Steps are timed in processor seconds of one thread, so that neighbours count little; trainings by the clock, from the
journals that real runs leave.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flows.record import Recorder
from models.interface import Targets
from tests.conftest import CARD, store, write_squares
from tests.services.two_nodes import namespaces_refused, ray_nodes
from training.cluster import embedded_cluster
from training.feeding import to_device, training_data
from training.jobs import Jobs, code_snapshot
from training.loop import Hooks, train_one_epoch
from training.records import JournalEntry, journal_entry, read_journal, read_result, record_attempt, write_entry
from training.shares import PARTS
from training.spec import ArchitectureSpec, ComputeSpec, DatasetSpec, RunSpec, TrainingSpec, resolve_precision
from training.state import TrainingState, build_state, set_training_mode
from training.system import SystemMeter
from training.workers import Workers

ROOT = Path(__file__).parents[1]
ALONE = Workers(0, 1, torch.device("cpu"))
REPEATS = 3
ON_NODES = "Ray Train, 2 workers on 2 nodes"
NOTHING = Hooks(lambda *_: None)


def training_benches() -> None:
    """All but `waiting_for_data`, which needs large pictures."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="speck-bench-") as folder:
        prepared = Path(folder) / "prepared"
        write_squares(prepared, {"train": 96, "val": 8, "test": 8})
        for name in ("yolox-nano", "yolox-s"):
            our_step_against_bare(name, prepared)
        recording_against_none(Path(folder) / "recording", prepared)
        trainings(Path(folder), prepared)
    torch.set_num_threads(num_threads)


def our_step_against_bare(name: str, folder: Path, size_px: int = 320, num_steps: int = 2) -> None:
    """Forward, backward and optimiser of a network alone, and with its losses, against a step of the training loop."""
    spec = run_spec(name, size_px=size_px)
    batches = first_epoch(spec, folder)[:num_steps]
    ready = [to_device(batch, ALONE.device) for batch in batches]
    ours, bare, lossy = (build_state(spec, ALONE.device) for _ in range(3))
    for state in (bare, lossy):
        set_training_mode(state.model, spec)

    def step() -> None:
        ours.steps_in_epoch = 0
        train_one_epoch(spec, ours, ours.model, batches, ALONE, NOTHING, closing=False)  # type: ignore[arg-type]

    sides: tuple[Callable[[], object], ...] = (
        step,
        partial(bare_steps, spec, bare, ready, mean_output),
        partial(bare_steps, spec, lossy, ready, mean_loss),
    )
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(2 * REPEATS):
        for side, times in zip(sides, seconds, strict=True):
            started = time.process_time()
            side()
            times.append((time.process_time() - started) / num_steps)
    # The first of each allocates.
    our, alone, with_losses = (statistics.median(times[1:]) for times in seconds)
    title = f"{name} at {size_px} px, batch {spec.training.batch_size}, {spec.training.precision}, one thread"
    print(
        f"{title}: forward, backward, optimiser against our step: {alone:.3f} s / {our:.3f} s = {alone / our:.1%}; "
        f"losses included: {with_losses:.3f} s, {with_losses / our:.1%}",
        flush=True,
    )


def recording_against_none(folder: Path, prepared: Path, num_epochs: int = 3) -> None:
    """An epoch whose numbers go to the journal and on to MLflow, in SQLite, against one whose numbers go nowhere."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    recording: list[float] = []
    spec = run_spec("yolox-nano", size_px=320)
    batches = first_epoch(spec, prepared)
    state = build_state(spec, ALONE.device)
    run_folder = folder / spec.run_key
    meter, warnings = SystemMeter(), list[str]()
    attempt = record_attempt(run_folder, spec, data_source="", code_hash="0" * 12)
    recorder = Recorder(f"sqlite:///{folder / 'mlflow.db'}", None, warnings.append)
    recorder.begin(attempt, run_folder)

    def record(metrics: dict[str, float], step: int, epoch: int) -> None:
        told = metrics | meter.read() | {"step": step, "epoch": epoch, "timestamp_ms": time.time_ns() // 1_000_000}
        write_entry(run_folder, journal_entry(attempt, told))
        recorder.sync(run_folder)

    for turn in range(4 * num_epochs * REPEATS):
        is_recorded = turn % 4 in (1, 2)  # Neither side always follows the other.
        started = time.process_time()
        state.steps_in_epoch = 0
        metrics = train_one_epoch(spec, state, state.model, batches, ALONE, NOTHING, closing=False)  # type: ignore[arg-type]
        if is_recorded:
            trained = time.process_time()
            record(metrics | {f"val/coco/metric_{n}": 0.5 for n in range(20)}, state.step, turn)
            recording.append(time.process_time() - trained)
        seconds[is_recorded].append(time.process_time() - started)
    meter.close()
    assert not warnings, warnings
    # The first of each prepares.
    on, off = (statistics.median(seconds[side][1:]) for side in (True, False))
    one = statistics.median(recording[1:])
    print(
        f"an epoch of {len(batches)} steps with its numbers in journal and MLflow, against without: {on:.3f} "
        f"/ {off:.3f} s of processor time = {on / off:.3f}; recording is {one:.3f} s, 1% of an epoch of "
        f"{100 * one:.0f} s",
        flush=True,
    )


def bare_steps(
    spec: RunSpec,
    state: TrainingState,
    batches: Sequence[tuple[Tensor, Targets]],
    loss: Callable[[TrainingState, Any, Targets], Tensor],
) -> None:
    """What no training does without."""
    for images, targets in batches:
        state.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.training.precision == "bf16"):
            predictions = state.model(images)
        loss(state, predictions, targets).backward()
        state.optimizer.step()


def mean_output(state: TrainingState, predictions: Any, targets: Targets) -> Tensor:
    """A loss that costs next to nothing."""
    outputs = (value for value in vars(predictions).values() if isinstance(value, Tensor) and value.requires_grad)
    return torch.stack([output.mean() for output in outputs]).sum()


def mean_loss(state: TrainingState, predictions: Any, targets: Targets) -> Tensor:
    """The losses that are trained with."""
    losses = state.detector.criterion(predictions, targets)
    return torch.stack([total / losses.counts[term].clamp(min=1) for term, total in losses.sums.items()]).sum()


def waiting_for_data(folder: Path, num_processes: int, size_px: int = 640) -> None:
    """The share of an epoch that waits for batches, when every picture has been decoded before."""
    spec = run_spec("yolox-nano", size_px=size_px, compute=ComputeSpec(workers=1, loader_processes=num_processes))
    state = build_state(spec, ALONE.device)
    dataset, sampler, loader = training_data(spec, folder, ALONE, None)
    list(loader)
    shares = []
    for epoch in range(REPEATS):
        dataset.set_epoch(epoch, joins=True)
        sampler.set_epoch(epoch)
        state.steps_in_epoch = 0
        metrics = train_one_epoch(spec, state, state.model, loader, ALONE, NOTHING, closing=False)
        shares.append(metrics["share/data_wait"])
    print(
        f"yolox-nano training at {size_px} px, batch {spec.training.batch_size}, {num_processes} loader processes: "
        f"{statistics.median(shares):.1%} is waiting for data",
        flush=True,
    )


class Ran(NamedTuple):
    """What a run's journal says of its epochs after the first, and what came before and after: all in seconds."""

    images_per_s: float
    shares: dict[str, float]
    cluster_s: float
    start_s: float
    report_s: float
    end_s: float


def trainings(folder: Path, prepared: Path) -> None:
    """Whole runs, one after the other in turns: by Ray Train and by torchrun, of one worker and of two."""
    source = folder / "storage"
    version = store(prepared, source)
    os.environ["SPECK_STORE"] = str(folder / "store")
    two, one, apart, spread = (
        partial(
            run_spec, "yolox-nano", size_px=320, version=version, epochs=4, batch_size=16, closing_epochs=0,
            validate_every_epochs=9, sync_batch_norm=sync,
            compute=ComputeSpec(workers=workers, max_failures=0, placement=placement),
        )
        for workers, sync, placement in (
            (2, True, "PACK"), (1, True, "PACK"), (2, False, "PACK"), (2, True, "STRICT_SPREAD"),
        )
    )  # fmt: skip
    sides: dict[str, Callable[[int], list[Ran]]] = {
        "Ray Train, 2 workers": lambda seed: [by_ray(folder / f"ray-{seed}", two(seed=seed), source)],
        "torchrun, 2 workers": lambda seed: by_torchrun([folder / f"two-{seed}"], two(seed=seed), source),
        "Ray Train, 1 worker": lambda seed: [by_ray(folder / f"lonely-{seed}", one(seed=seed), source)],
        "torchrun, 1 worker": lambda seed: by_torchrun([folder / f"one-{seed}"], one(seed=seed), source),
        "torchrun, 2 workers without SyncBN": lambda seed: by_torchrun(
            [folder / f"apart-{seed}"], apart(seed=seed), source
        ),
        "2 runs of 1 worker at once": lambda seed: by_torchrun(
            [folder / f"{which}-{seed}" for which in ("left", "right")], one(seed=seed), source
        ),
    }
    if (why := namespaces_refused()) is None:
        sides[ON_NODES] = lambda seed: by_two_nodes(folder / f"nodes-{seed}", spread(seed=seed), source)
    else:
        print(f"without {ON_NODES}: {why}")
    runs: dict[str, list[list[Ran]]] = {name: [] for name in sides}
    for seed in range(REPEATS):
        for name, side in sides.items():
            runs[name].append(side(seed))
    pace = {name: statistics.median(sum(run.images_per_s for run in both) for both in of) for name, of in runs.items()}
    ray, torchrun, ray_alone, alone, unsynced, at_once, *on_nodes = pace.values()
    print(f"yolox-nano at 320 px, batch 16, {one().training.precision}, one thread a worker, epochs after the first:")
    print(f"    Ray Train against torchrun, 2 workers: {ray:.2f} / {torchrun:.2f} images/s = {ray / torchrun:.3f}")
    print(f"    the same, 1 worker: {ray_alone:.2f} / {alone:.2f} = {ray_alone / alone:.3f}")
    print(f"    1 to 2 workers: {torchrun:.2f} / {alone:.2f} images/s = {torchrun / alone:.2f}")
    for nodes in on_nodes:
        print(f"    1 to 2 workers, {ON_NODES}: {nodes:.2f} / {ray_alone:.2f} = {nodes / ray_alone:.2f}")
    print(f"    without SyncBN: {unsynced:.2f} / {alone:.2f} = {unsynced / alone:.2f}")
    print(f"    2 runs at once that share nothing, all that there is room for: {at_once / alone:.2f}")
    for name, of in runs.items():
        describe(name, [run for both in of for run in both])


def describe(name: str, runs: list[Ran]) -> None:
    """Print where the time of a kind of runs went."""
    shares = {part: statistics.median(run.shares[part] for run in runs) for part in PARTS}
    cluster_s, start_s, report_s, end_s = (
        statistics.median(getattr(run, what) for run in runs) for what in ("cluster_s", "start_s", "report_s", "end_s")
    )
    print(f"    {name}: " + ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    cluster = f"cluster {cluster_s:.1f} s, " if cluster_s else ""
    print(
        f"        {cluster}start to first step {start_s:.1f} s, a report {report_s:.2f} s, result to end {end_s:.1f} s",
        flush=True,
    )


def by_ray(folder: Path, spec: RunSpec, source: Path) -> Ran:
    """One Ray job on a cluster of its own: no other run may have the cluster's processes beside it."""
    folder.mkdir()
    (folder / "spec.json").write_text(spec.model_dump_json())
    # From a process of its own, in which Ray would start no second one.
    command = [sys.executable, "-m", "tests.bench_training", str(folder), str(source)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    started, submitted, ended, gone = map(float, done.stdout.splitlines()[-1].split())
    return read(folder / spec.run_key, submitted, ended)._replace(cluster_s=submitted - started + gone - ended)


def ray_job(folder: Path, source: str) -> None:
    """Run FOLDER/spec.json and print when this started, the job was submitted, it ended, and the cluster was gone."""
    spec = RunSpec.model_validate_json((folder / "spec.json").read_bytes())
    run_folder = folder / spec.run_key
    times = [time.time()]
    with embedded_cluster(folder, num_cpus=2) as cluster, code_snapshot(ROOT) as code:
        jobs = Jobs(cluster)
        attempt = record_attempt(run_folder, spec, data_source=source, code_hash="0" * 12)
        times.append(time.time())
        jobs.follow(jobs.submit(attempt, run_folder, code), lambda _: None)
        times.append(time.time())
    print(*times, time.time())


def by_two_nodes(folder: Path, spec: RunSpec, source: Path) -> list[Ran]:
    """One Ray job with a worker on each of two nodes in network namespaces, on the same two cores."""
    folder.mkdir()
    with ray_nodes(folder) as nodes:
        nodes.start_head(num_cpus=0)
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        jobs, submitted = Jobs(nodes.cluster), time.time()
        run_folder = folder / spec.run_key
        attempt = record_attempt(run_folder, spec, data_source=str(source), code_hash="0" * 12)
        with code_snapshot(ROOT) as code:
            jobs.follow(jobs.submit(attempt, run_folder, code), lambda _: None)
        return [read(run_folder, submitted, time.time())]


def by_torchrun(folders: list[Path], spec: RunSpec, source: Path) -> list[Ran]:
    """As many equal runs at once as there are folders."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(spec.compute.workers), "-m", "training.loop"]
    started, processes = time.time(), []
    for folder in folders:
        folder.mkdir()
        (folder / "spec.json").write_text(spec.model_dump_json())
        arguments = [str(folder / "spec.json"), "--runs", str(folder), "--data", str(source)]
        output = (folder / "output").open("wb")
        processes.append(subprocess.Popen([*command, *arguments], env=environment, stdout=output, stderr=output))
    ran = []
    for folder, process in zip(folders, processes, strict=True):
        if process.wait():
            raise RuntimeError((folder / "output").read_text())
        ran.append(read(folder / spec.run_key, started, time.time()))
    return ran


def read(run_folder: Path, started: float, ended: float) -> Ran:
    """From the records of a run that was started and ended at these times, in seconds since the epoch."""
    journal, result = read_journal(run_folder), read_result(run_folder)
    assert result is not None
    steady = journal[1:]

    def reported(entry: JournalEntry) -> float:
        return entry.timestamp_ms / 1000

    return Ran(
        images_per_s=statistics.median(entry.metrics["train/images_per_s"] for entry in steady),
        shares={part: statistics.mean(entry.metrics[f"share/{part}"] for entry in steady) for part in PARTS},
        cluster_s=0.0,
        start_s=reported(journal[0]) - journal[0].seconds - started,
        report_s=statistics.median(
            reported(entry) - entry.seconds - reported(before) for before, entry in zip(journal, steady, strict=False)
        ),
        end_s=ended - result.finished_ms / 1000,
    )


def first_epoch(spec: RunSpec, folder: Path) -> list[Any]:
    """Its batches."""
    dataset, sampler, loader = training_data(spec, folder, ALONE, None)
    dataset.set_epoch(0, joins=True)
    sampler.set_epoch(0)
    return list(loader)


def run_spec(
    name: str,
    *,
    size_px: int,
    version: str = "0" * 32,
    seed: int = 0,
    compute: ComputeSpec = ComputeSpec(workers=1),  # noqa: B008 (frozen)
    **training: Any,
) -> RunSpec:
    """A run on the squares of the tests, in the precision that this machine is good at."""
    values = {"batch_size": 8, "precision": resolve_precision("auto", gpus_per_worker=0)} | training
    return RunSpec(
        architecture=ArchitectureSpec(name=name),
        dataset=DatasetSpec(name=CARD.name, version=version, card=CARD),
        training=TrainingSpec(input_size_px=size_px, **values),
        compute=compute,
        seed=seed,
    )


if __name__ == "__main__":
    ray_job(Path(sys.argv[1]), sys.argv[2])

"""Train a registered version again, from its record alone, and say what came out differently."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from data.objects import MissingObject, StoreError
from data.remote import NoRemote, fetch_version
from flows.commit_code import code_of, environment_of
from flows.evaluate import dataset_folder
from flows.experiment import readable_errors
from flows.record import flat_scores
from flows.settings import REPO, Settings
from tracking.names import metric_name
from tracking.packaging import download_verified
from tracking.recorded import RecordedRun, read_run
from tracking.registry import Version
from training.records import RESULT, RunResult, read_journal, read_result
from training.say import PROGRESS_MARK
from training.spec import ComputeSpec, RunSpec
from training.state import warm_start_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOSS = "train/loss"
CODE_HASH, COMMIT, DIRTY = "speck.code_hash", "mlflow.source.git.commit", "speck.dirty"
RUN_KEY = re.compile("[0-9a-f]{12}")
# A training that is told to end keeps a checkpoint first.
LEAVE_S = 60.0


class CannotReproduce(RuntimeError):
    """Something that the training needs is not there, or the training did not end well."""


@dataclass(frozen=True)
class Weights:
    """How the tensors of two trainings differ; `largest_difference` is None where a name, shape or type does."""

    num_tensors: int
    num_different: int
    largest_difference: float | None


@dataclass(frozen=True)
class Reproduced:
    """The second training beside the first: scores, and losses by step, as (recorded, reproduced)."""

    run_folder: Path
    code: str
    scores: Mapping[str, tuple[float | None, float | None]]
    losses: Mapping[int, tuple[float | None, float | None]]
    weights: Weights

    @property
    def is_identical(self) -> bool:
        """Whether the weights are the same, bit by bit."""
        return self.weights.num_different == 0


def reproduce_version(
    client: MlflowClient, dataset: str, version: Version, settings: Settings, say: Callable[[str], object]
) -> Reproduced:
    """Train what was registered as `version` again, under its spec, by its code, on its data, and compare.

    It trains on this machine by torchrun, which leaves the records of a Ray job, into a folder of its own below the
    home: the first run is only read. An earlier reproduction that was interrupted goes on; a finished one is replaced.

    Raises, before anything is trained:
        CannotReproduce: the MLflow run, the dataset version, the weights it started from, or GPUs are not there.
        NoSuchCode: the code is not to be had.
        DigestMismatch: the version's files are not those that were registered.
    And CannotReproduce when the training fails.
    """
    title = f"{dataset}@{version.version}"
    run = read_run(client, version.run_id, (LOSS,))
    if run is None or CODE_HASH not in run.tags:
        raise CannotReproduce(
            f"{title}: its MLflow run {version.run_id or '(none)'} is gone, and with it what trained it"
        )
    if not RUN_KEY.fullmatch(version.run_key):
        # It names a folder, which is deleted where an earlier reproduction has finished in it.
        raise CannotReproduce(
            f"{title}: {version.run_key!r}, its tag speck.run_key, is no run key; correct it in MLflow"
        )
    with tempfile.TemporaryDirectory(prefix="speck-model-") as folder:
        artifacts = download_verified(client, dataset, version.version, Path(folder)) / "artifacts"
        spec = _read_spec(artifacts / "spec.json", title)
        code_hash, commit = run.tags[CODE_HASH], run.tags.get(COMMIT, "unknown")
        is_dirty = run.tags.get(DIRTY) == "True"
        with code_of(code_hash, commit, is_dirty=is_dirty, architecture=spec.architecture.name) as code:
            where = "the code that lies here" if code == REPO else f"commit {commit[:12]}"
            say(f"{title}: run {version.run_key}, {where}, data {spec.dataset.version[:12]}")
            _require_gpus(spec, title)
            _require_data(spec, settings, title)
            # Below it code of another release names the run as it did then.
            run_folder = settings.home / "reproduced" / f"{dataset}-v{version.version}" / "runs" / version.run_key
            _bring_warm_start(spec, settings, run_folder.parent, title)
            result = _train(spec.compute, artifacts / "spec.json", run_folder, code, settings, say)
            if result.code_hash != code_hash:
                raise CannotReproduce(f"{title}: {result.code_hash} trained instead of {code_hash}")
        weights = compare_weights(artifacts / "weights.safetensors", run_folder / "artifacts" / "weights.safetensors")
    return Reproduced(run_folder, where, _scores(run, result), _losses(run, run_folder), weights)


def _read_spec(path: Path, title: str) -> RunSpec:
    try:
        return RunSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "; ".join(readable_errors(error, RunSpec))
        raise CannotReproduce(
            f"{title}: this release cannot read its spec: {faults}. Run this in a checkout of the release of then"
        ) from None


def compare_weights(recorded: Path, reproduced: Path) -> Weights:
    """How two safetensors files differ, tensor by tensor and bit by bit."""
    first, second = load_file(recorded), load_file(reproduced)
    names, different, largest = first.keys() | second.keys(), 0, 0.0
    comparable = True
    for name in names:
        one, other = first.get(name), second.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            different, comparable = different + 1, False
        elif not torch.equal(_bytes(one), _bytes(other)):
            different += 1
            largest = max(largest, float((one.double() - other.double()).abs().max()))
    return Weights(len(names), different, largest if comparable else None)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _require_gpus(spec: RunSpec, title: str) -> None:
    compute = spec.compute
    if compute.gpus_per_worker and torch.cuda.device_count() < compute.min_workers:
        raise CannotReproduce(
            f"{title} was trained on GPUs, {compute.min_workers} at least, and this machine has "
            f"{torch.cuda.device_count()}. Run this on a machine that has them"
        )


def _require_data(spec: RunSpec, settings: Settings, title: str) -> None:
    """Have this node's store hold the dataset version, from the DVC cache or, where that lacks it, the remote."""
    try:
        try:
            dataset_folder(spec, settings)
        except MissingObject:
            fetch_version(spec.dataset.version, REPO)
            dataset_folder(spec, settings)
    except (StoreError, NoRemote) as error:
        raise CannotReproduce(
            f"{title}: version {spec.dataset.version} of {spec.dataset.name} is not to be had: {error}"
        ) from error


def _bring_warm_start(spec: RunSpec, settings: Settings, runs: Path, title: str) -> None:
    """Copy the weights that the run began with, if any, to where the second training looks for them."""
    if spec.training.warm_start is None:
        return
    source, target = (warm_start_path(storage, spec.training.warm_start) for storage in (settings.storage, runs))
    if not source.is_file():
        raise CannotReproduce(f"{title} began with the weights {spec.training.warm_start}, and {source} is gone")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _train(
    compute: ComputeSpec, spec: Path, run_folder: Path, code: Path, settings: Settings, say: Callable[[str], object]
) -> RunResult:
    """Train and score the spec in a file on this machine, by the code in a folder."""
    if (run_folder / RESULT).is_file():
        shutil.rmtree(run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(compute.min_workers), "-m", "training.loop", str(spec)]
    command += ["--runs", str(run_folder.parent), "--data", settings.data_source]
    environment = environment_of(code) | {"OMP_NUM_THREADS": str(max(1, int(compute.cpus_per_worker)))}
    last = ""
    process = subprocess.Popen(
        command, cwd=code, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _, is_news, text = line.partition(PROGRESS_MARK)
            if is_news:
                say(text.strip())
            elif line.strip():
                last = line.strip()
        process.wait()
    except BaseException:
        process.terminate()
        process.wait(LEAVE_S)
        raise
    result = read_result(run_folder)
    if process.returncode != 0 or result is None:
        raise CannotReproduce(f"the training ended with code {process.returncode} and no result: {last}")
    return result


def _scores(run: RecordedRun, result: RunResult) -> dict[str, tuple[float | None, float | None]]:
    """Scores over all classes, without the prefix of MLflow's names."""
    new = {metric_name(name): value for name, value in flat_scores(result).items()}
    # final/split/protocol/metric; a class would be a fifth part.
    names = sorted(
        name for name in new.keys() | run.metrics.keys() if name.startswith("final/") and name.count("/") == 3
    )
    return {name.removeprefix("final/"): (run.metrics.get(name), new.get(name)) for name in names}


def _losses(run: RecordedRun, run_folder: Path) -> dict[int, tuple[float | None, float | None]]:
    old = run.by_step[LOSS]
    new = {entry.step: entry.metrics.get(LOSS) for entry in read_journal(run_folder)}
    return {step: (old.get(step), new.get(step)) for step in sorted(old.keys() | new.keys())}

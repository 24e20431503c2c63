"""From what a user calls a model to its weights, and to the spec that they are scored under."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from data.card import DatasetCard, load_card
from data.tiling import TileGrid
from data.versioning import current_version
from evaluation.analysis_records import OperatingPoint
from flows.decisions import decisions
from flows.evaluate import find_result
from flows.experiment import readable_errors
from flows.settings import REPO, Settings
from tracking.client import connect
from tracking.packaging import download_verified
from tracking.registry import Version, history
from training.artifacts import read_operating_point
from training.checkpoint import file_sha256
from training.scoring import score_options
from training.spec import ArchitectureSpec, ComputeSpec, DatasetSpec, RunSpec, TrainingSpec, resolve_precision

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTRY = "models:/"
URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
WEIGHTS, SPEC = "weights.safetensors", "spec.json"


class UnknownModel(LookupError):
    """No registered version, no file or no architecture goes by this name."""


class OtherClasses(ValueError):
    """A model was asked to find classes that it was not trained on."""


class UnpreparedDataset(LookupError):
    """A dataset has no version yet."""


@dataclass(frozen=True)
class FoundModel:
    """Weights, the spec of their run and its key. Of weights without a spec the key is the start of their sha256.

    `tiling`: the tiles that the model was scored by, if any; on another dataset the spec does not tell any more.
    `operating_point`: as chosen on val when the model was trained; weights alone have none.
    """

    spec: RunSpec
    weights: Path
    run_key: str
    tiling: TileGrid | None
    operating_point: OperatingPoint | None


@contextmanager
def find_model(
    name: str, settings: Settings, *, dataset: str | None = None, architecture: str | None = None
) -> Iterator[FoundModel]:
    """The model that `name` means, with the spec's dataset replaced by `dataset` in its current version, if given.

    `name`: `models:/NAME@alias` or `models:/NAME/VERSION`, of which a copy is made that lives as long as this block; a
    `.safetensors` file, with `spec.json` beside it or else of an `architecture` in its default settings; or a run key
    or its beginning.

    Raises:
        UnknownModel: there is no such version or file, the file's spec is missing or damaged, or it needs what was
            not given, or was given what it says itself.
        UnknownRun: see `find_result`.
        DigestMismatch: the version's files are not those that were registered.
        OtherClasses: the dataset has other classes than the model.
        UnknownDataset, UnpreparedDataset: there is no such dataset, or no version of it.
    """
    path = Path(name).expanduser()
    is_file = not name.startswith(REGISTRY) and (path.suffix != "" or len(path.parts) > 1)
    if architecture is not None and not (is_file and not path.with_name(SPEC).is_file()):
        raise UnknownModel(
            f"--architecture={architecture!r} is for a weights file without {SPEC} beside it; leave it out"
        )
    with tempfile.TemporaryDirectory(prefix="speck-model-") as folder:
        if is_file:
            found = _of_file(path, dataset, architecture)
        elif name.startswith(REGISTRY):
            artifacts = _registered(name, settings, Path(folder)) / "artifacts"
            found = _of_run(artifacts / WEIGHTS)
        else:
            result = find_result(name, settings)
            artifacts = settings.storage / result.run_key / "artifacts"
            found = _found(result.spec, artifacts / WEIGHTS, result.run_key)
        yield found if dataset is None else _on(found, _dataset(dataset))


def _registered(uri: str, settings: Settings, folder: Path) -> Path:
    """A verified copy of a registered version's packaged folder."""
    if (asked := URI.fullmatch(uri)) is None:
        raise UnknownModel(f"{uri!r} must be models:/NAME@alias or models:/NAME/VERSION")
    client = connect(settings.tracking_uri)
    version = find_version(client, asked["name"], asked["alias"] or asked["version"], settings)
    return download_verified(client, asked["name"], version.version, folder)


def find_version(client: MlflowClient, dataset: str, asked: str, settings: Settings) -> Version:
    """The registered version with the number or the alias `asked`; what an alias means the ledger says.

    Raises UnknownModel when there is none, and what `decisions` does.
    """
    if not asked.isdecimal():
        decisions(client, settings, dataset)
    versions = history(client, dataset)
    for version in versions:
        if asked in version.aliases or str(version.version) == asked:
            return version
    known = ", ".join(str(version.version) + "".join(f" @{alias}" for alias in version.aliases) for version in versions)
    raise UnknownModel(
        f"{dataset}@{asked} is not registered. "
        + (f"Versions of {dataset}: {known}" if known else f"{dataset!r} has no version; run `speck train-all`")
    )


def _of_file(weights: Path, dataset: str | None, architecture: str | None) -> FoundModel:
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise UnknownModel(f"{str(weights)!r} must be a .safetensors file that exists, a run key or models:/NAME@alias")
    if architecture is None and weights.with_name(SPEC).is_file():
        return _of_run(weights)
    if architecture is None or dataset is None:
        raise UnknownModel(
            f"{str(weights)!r} has no {SPEC} beside it, so say what it is: --architecture NAME, and the DATASET whose "
            "classes it finds"
        )
    import torch

    import models

    settings = asdict(models.configure(architecture))
    on_gpu = int(torch.cuda.is_available())
    spec = RunSpec(
        architecture=ArchitectureSpec(name=architecture, settings=settings),
        dataset=_dataset(dataset),
        training=TrainingSpec(precision=resolve_precision("auto", gpus_per_worker=on_gpu)),
        compute=ComputeSpec(gpus_per_worker=on_gpu),
    )
    return _found(spec, weights, file_sha256(weights)[:12])


def _of_run(weights: Path) -> FoundModel:
    path = weights.with_name(SPEC)
    try:
        spec = RunSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "\n".join(readable_errors(error, RunSpec))
        raise UnknownModel(f"{path} is no spec of a run; put the run's own beside its weights:\n{faults}") from None
    return _found(spec, weights, spec.run_key)


def _found(spec: RunSpec, weights: Path, run_key: str) -> FoundModel:
    tiling = score_options(spec).tiling
    return FoundModel(spec, weights, run_key, tiling, read_operating_point(weights.parent))


def _dataset(name: str) -> DatasetSpec:
    card = load_card(name)
    version = current_version(name, REPO)
    if version is None:
        raise UnpreparedDataset(f"dataset {name!r} has no version yet; prepare it: `dvc repro prepare@{name}`")
    return DatasetSpec(name=name, version=version.version, card=card)


def _on(model: FoundModel, dataset: DatasetSpec) -> FoundModel:
    _require_same_classes(model.spec.dataset.card, dataset.card)
    return replace(model, spec=model.spec.model_copy(update={"dataset": dataset}))


def _require_same_classes(own: DatasetCard, other: DatasetCard) -> None:
    if own.classes != other.classes:
        raise OtherClasses(
            f"the model finds {', '.join(own.classes)} (of {own.name}), {other.name} has {', '.join(other.classes)}: "
            "the same classes in the same order are needed. Choose another dataset, or train a model on it"
        )

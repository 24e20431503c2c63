"""What to train: an experiment file, changed by `--set` and the axes of the matrix, checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data.card import did_you_mean, load_card
from flows.budget import Budget
from training.spec import (
    ArchitectureSpec,
    ComputeSpec,
    DatasetSpec,
    RunSpec,
    ScoringSpec,
    TrainingSpec,
    resolve_precision,
)

RUNS = Path(__file__).parent / "runs"


class BadExperiment(ValueError):
    """An experiment with unknown keys or impossible values; the message lists all of them."""


class Experiment(BaseModel):
    """The product of architectures, datasets and seeds under one recipe. One file of `flows/runs/`.

    `settings` changes an architecture's own settings: architecture name -> setting -> value; a list of such changes
    makes a cell of each. `training_by_dataset` changes the recipe for a dataset: dataset name -> key -> value. `budget`
    ends a run in order, and changes no cell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architectures: tuple[str, ...] = Field(min_length=1)
    datasets: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    settings: dict[str, tuple[dict[str, Any], ...]] = Field(default_factory=dict)
    training: TrainingSpec = TrainingSpec()
    training_by_dataset: dict[str, dict[str, Any]] = Field(default_factory=dict)
    scoring: ScoringSpec = ScoringSpec()
    compute: ComputeSpec = ComputeSpec()
    budget: Budget = Budget()

    @field_validator("settings", mode="before")
    @classmethod
    def _one_variant_is_a_list_of_one(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        for name, variants in settings.items():
            if not isinstance(variants, (dict, list, tuple)):
                raise ValueError(f"{name}: expected settings by architecture, as in settings.{name}.width=0.5")
            if len(variants) == 0 and not isinstance(variants, dict):
                raise ValueError(f"{name}: an empty list makes no cell; leave it out, or write [{{}}]")
        return {name: [one] if isinstance(one, dict) else one for name, one in settings.items()}

    @field_validator("architectures", "datasets", "seeds")
    @classmethod
    def _no_cell_twice(cls, axis: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(axis)) != len(axis):
            raise ValueError("every value must occur once")
        return axis

    @model_validator(mode="after")
    def _hours_have_a_price(self) -> Experiment:
        if self.budget.price is not None and self.compute.price_per_hour is None:
            raise ValueError("budget.price needs compute.price_per_hour, of a GPU or of a CPU")
        return self

    @model_validator(mode="after")
    def _every_worker_has_work(self) -> Experiment:
        workers = self.compute.max_workers
        for name in self.datasets:
            batch = self.training_for(name).batch_size
            if batch < workers:
                raise ValueError(f"training.batch_size must be at least compute.workers ({workers}), got {batch}")
        return self

    def training_for(self, dataset: str) -> TrainingSpec:
        """The recipe for one dataset. Raises ValueError for unknown keys and impossible values."""
        changes = self.training_by_dataset.get(dataset, {})
        try:
            return TrainingSpec.model_validate(_merged(self.training.model_dump(), changes))
        except ValidationError as error:
            lines = "; ".join(line.strip() for line in readable_errors(error, TrainingSpec))
            raise ValueError(f"training_by_dataset.{dataset}: {lines}") from None

    def variants_of(self, architecture: str) -> tuple[dict[str, Any], ...]:
        """The changes to an architecture's settings, one for each cell; none at all is one."""
        return self.settings.get(architecture) or ({},)

    def resolved_architectures(self) -> list[ArchitectureSpec]:
        """Every architecture in every variant, all settings resolved."""
        import models

        return [
            ArchitectureSpec(name=name, settings=asdict(models.configure(name, **changes)))
            for name in self.architectures
            for changes in self.variants_of(name)
        ]

    def cells(
        self, versions: dict[str, str], warm_start: Callable[[RunSpec], str | None] = lambda _: None
    ) -> list[RunSpec]:
        """One spec for each architecture x dataset x seed, given the version of each dataset.

        `warm_start` says what a cell that would start cold starts from, as `sha256:<hex>`.

        Raises:
            BadFreeze: `training.freeze` fits an architecture ill; see `require_parts`.
        """
        from training.state import require_parts

        architectures = self.resolved_architectures()
        cold = [
            RunSpec(
                architecture=architecture,
                dataset=dataset,
                training=self._resolved_training(dataset.name),
                scoring=self.scoring,
                compute=self.compute,
                seed=seed,
            )
            for dataset in (
                DatasetSpec(name=name, version=versions[name], card=load_card(name))
                for name in self.datasets
                if name in versions
            )
            for architecture in architectures
            for seed in self.seeds
        ]
        cells = [spec.with_warm_start(warm_start(spec)) for spec in cold]
        for spec in cells:
            require_parts(spec)
        return cells

    def _resolved_training(self, dataset: str) -> TrainingSpec:
        training = self.training_for(dataset)
        precision = resolve_precision(training.precision, gpus_per_worker=self.compute.gpus_per_worker)
        return training.model_copy(update={"precision": precision, "warm_start": None})


def load_experiment(
    spec: Path | str = "default",
    sets: Sequence[str] = (),
    *,
    architectures: Sequence[str] = (),
    datasets: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Experiment:
    """The experiment in `spec` (a file, or a name in `flows/runs/`), with the changes applied.

    `sets` are `key.path=value`, the value in YAML.

    Raises:
        BadExperiment: no such file, or anything in it or in the changes is unknown or impossible.
        UnknownDataset, models.UnknownArchitecture, models.UnknownSetting: the name is not known.
    """
    path = _find(spec)
    content = read_mapping(path, BadExperiment)
    for change in sets:
        _apply(content, change)
    chosen = {"architectures": list(architectures), "datasets": list(datasets), "seeds": list(seeds)}
    try:
        whole = Experiment.model_validate(content)
        experiment = Experiment.model_validate(content | {key: values for key, values in chosen.items() if values})
    except ValidationError as error:
        changed = " as changed by --set" if sets else ""
        raise BadExperiment(f"{path.name}{changed}:\n" + "\n".join(readable_errors(error, Experiment))) from None
    _check_names(experiment, whole)
    return experiment


def check_batch(experiment: Experiment, dataset: str, num_train_images: int) -> None:
    """Raise BadExperiment when a dataset's training split is smaller than one batch."""
    batch_size = experiment.training_for(dataset).batch_size
    if batch_size > num_train_images:
        raise BadExperiment(
            f"training.batch_size is {batch_size}, but {dataset} has {num_train_images} training "
            "images; set a smaller batch"
        )


def _check_names(experiment: Experiment, whole: Experiment) -> None:
    """Check all names, also those of which `--architectures` and `--datasets` chose only some."""
    import models

    architectures = {*whole.architectures, *experiment.architectures}
    datasets = {*whole.datasets, *experiment.datasets}
    for key, names, known in (
        ("settings", experiment.settings.keys(), architectures),
        ("training_by_dataset", experiment.training_by_dataset.keys(), datasets),
    ):
        if unused := names - known:
            raise BadExperiment(f"{key}.{min(unused)}: not in the matrix ({', '.join(sorted(known))}); add it there")
    for name in sorted(architectures):
        variants = [models.configure(name, **changes) for changes in experiment.variants_of(name)]
        if len(set(variants)) < len(variants):
            raise BadExperiment(f"settings.{name}: two variants come to the same settings; every one must differ")
    for name in sorted(datasets):
        load_card(name)
        try:
            experiment.training_for(name)
        except ValueError as error:
            raise BadExperiment(str(error)) from None


def _merged(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _find(spec: Path | str) -> Path:
    path = Path(spec)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise BadExperiment(f"{path}: no such experiment file; those at hand: {_known()}")
    named = RUNS / f"{spec}.yaml"
    if named.is_file():
        return named
    raise BadExperiment(
        f"{spec!r} is no experiment in flows/runs.{did_you_mean(str(spec), _known())} Known: {', '.join(_known())}"
    )


def _known() -> list[str]:
    return sorted(path.stem for path in RUNS.glob("*.yaml"))


def _apply(content: dict[str, Any], change: str) -> None:
    key_path, equals, text = change.partition("=")
    if not equals or not key_path:
        raise BadExperiment(f"--set {change!r}: expected key.path=value, for example training.epochs=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadExperiment(f"--set {change!r}: the value is not YAML: {error}") from error
    *parents, last = key_path.split(".")
    place = content
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise BadExperiment(f"--set {change!r}: {parent!r} holds {inner!r}, which has no keys; set it as a whole")
        place = inner
    place[last] = value
    if parents[:1] == ["training"]:
        # What is said now holds for every dataset; a dataset's own recipe would win over it without a word.
        for recipe in (content.get("training_by_dataset") or {}).values():
            _forget(recipe, [*parents[1:], last])


def _forget(content: Any, path: Sequence[str]) -> None:
    """Take the value at a path of keys out, if there is one."""
    for key in path[:-1]:
        content = content.get(key) if isinstance(content, dict) else None
    if isinstance(content, dict):
        content.pop(path[-1], None)


def read_mapping(path: Path, refused: type[ValueError]) -> dict[str, Any]:
    """The keys and values of a YAML file that the user wrote; raises `refused` where it holds nothing like that."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refused(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise refused(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def readable_errors(error: ValidationError, model: type[BaseModel]) -> Iterable[str]:
    """One line for each problem: key, value, rule, and the nearest known key where one is unknown."""
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the whole"
        if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            known = _fields_at(model, problem["loc"][:-1])
            hint = did_you_mean(str(problem["loc"][-1]), known)
            yield f"  {key}: unknown key.{hint} Known: {', '.join(known)}"
        else:
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            yield f"  {key}: {problem['msg'].removeprefix('Value error, ')}{got}"


def _fields_at(model: type[Any], location: Sequence[int | str]) -> list[str]:
    for part in location:
        hint = get_type_hints(model).get(str(part), object)
        # A section that may be left out has the type `Section | None`.
        model = get_args(hint)[0] if isinstance(hint, UnionType) else hint
        if not (isinstance(model, type) and (issubclass(model, BaseModel) or is_dataclass(model))):
            return []
    return sorted(model.model_fields if issubclass(model, BaseModel) else (field.name for field in fields(model)))

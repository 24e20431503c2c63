"""`RunSpec`: everything that decides the result of one run, and its identity, the run key.

The same object travels from YAML through Prefect and Ray into the workers, MLflow and the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data.augment import AugmentConfig
from data.card import DatasetCard
from data.tiling import TileGrid

# Of the network's square input: beyond it a batch takes more memory than machines have.
MAX_INPUT_PX = 8192


def _later(default: Any, **rules: Any) -> Any:
    """A field that came later: left out at its default, so that what was stored before it keeps its hash."""
    return Field(default, exclude_if=lambda value: value == default, **rules)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ArchitectureSpec(_Section):
    """A row of `models.ARCHITECTURES` with every setting resolved."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _as_json_gives_them_back(cls, settings: dict[str, Any]) -> dict[str, Any]:
        # A tuple becomes a list on the way to a worker: a spec must equal its copy there.
        plain: dict[str, Any] = json.loads(canonical_json(settings))
        return plain

    @property
    def label(self) -> str:
        """Name for people: with the settings that are not the architecture's own."""
        import models

        row = models.ARCHITECTURES.get(self.name)
        own = {} if row is None else json.loads(canonical_json(asdict(row.config)))
        changed = [f"{key}={value}" for key, value in self.settings.items() if own.get(key) != value]
        return " ".join([self.name, *changed])


class DatasetSpec(_Section):
    """One version of one dataset; `version` is the DVC hash of the prepared folder."""

    name: str
    version: str = Field(pattern=r"^[0-9a-f]{32}$")
    card: DatasetCard


class TrainingSpec(_Section):
    """The recipe. `batch_size` counts images per optimiser step over all workers.

    `accumulation`: into how many parts each worker cuts its share of a batch, to save memory; loss and gradients are
    those of the whole batch, batch normalisation sees a part. `sync_batch_norm`: batch normalisation over the shares
    of all workers, so that their number does not matter. `clip_norm`: longest gradient. `patience_epochs`: end after
    so many epochs without a better val coco/AP, with the weights of the best. `compile`: with torch.compile.

    `warm_start`: the weights to begin with. In an experiment `champion`, a run key or a file; in a run's spec
    `sha256:<hex>` of what that was. `freeze`: parts of the detector, by module name, that keep their weights and their
    normalisation. `repeat_threshold`: images with a class that fewer than this share of all images show are seen more
    than once an epoch, see `data.sampler.repeat_factors`; 0 is off.
    """

    epochs: int = Field(12, ge=1)
    batch_size: int = Field(16, ge=1)
    input_size_px: int = Field(320, ge=32, le=MAX_INPUT_PX, multiple_of=32)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    final_learning_rate_ratio: float = Field(0.05, gt=0, le=1)
    closing_epochs: int = Field(2, ge=0)
    ema_decay: float = Field(0.9998, ge=0, lt=1)
    ema_ramp_steps: float = Field(2000.0, gt=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    validate_every_epochs: int = Field(1, ge=1)
    warm_start: str | None = _later(None)
    freeze: tuple[str, ...] = _later(())
    repeat_threshold: float = _later(0.0, ge=0, le=1)
    accumulation: int = _later(1, ge=1)
    sync_batch_norm: bool = _later(True)
    clip_norm: float | None = _later(None, gt=0)
    patience_epochs: int | None = _later(None, ge=1)
    compile: bool = _later(False)
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _fits(self) -> TrainingSpec:
        if self.closing_epochs > self.epochs:
            raise ValueError(f"closing_epochs must be at most epochs ({self.epochs}), got {self.closing_epochs}")
        if self.accumulation > self.batch_size:
            raise ValueError(f"accumulation must be at most batch_size ({self.batch_size}), got {self.accumulation}")
        return self


class ScoringSpec(_Section):
    """How detections are made and counted; part of the score key, not of the run key.

    `max_detections` caps an image's detections over all classes; `max_dets` is the protocol's own cap. `tiling`: look
    at pictures tile by tile and merge what is found; without it, by the tiles of the dataset's card, if it has any,
    else at whole pictures. Tiles larger than the pictures mean whole pictures in any case. `input_size_px`: another
    size than that of the training. `flip`: look at the mirror image of every picture as well.
    """

    score_threshold: float = Field(0.01, ge=0, le=1)
    nms_iou: float = Field(0.65, gt=0, le=1)
    max_detections: int = Field(500, ge=1)
    max_candidates: int = Field(10_000, ge=1)
    max_dets: int = Field(100, ge=1)
    tiling: TileGrid | None = _later(None)
    input_size_px: int | None = _later(None, ge=32, le=MAX_INPUT_PX, multiple_of=32)
    flip: bool = _later(False)


class ComputeSpec(_Section):
    """Where a run happens: outside the run key.

    `workers`: so many, or `[min, max]`: as many of these as there is room for, looked at every `resize_every_s`
    seconds. `placement`: on few nodes (PACK), spread over many (SPREAD), or each on a node of its own (STRICT_SPREAD).
    `accelerator`: Ray's name of the GPU that the workers need. `cache_gib`: memory of each worker, shared with its
    loader processes, for the decoded training split; one that does not fit is kept in the node's store, in a file that
    all workers and later runs share.

    `checkpoint_every_minutes`: beside the one that ends each epoch; `keep_checkpoints`: the latest, and the best by
    val AP beside them. `max_failures`: new starts after failures of any kind but a node that was taken away.
    `hang_timeout_s`: a worker that makes no progress for so long is ended. `price_per_hour`: of a worker's GPU, or of
    its CPU where there is no GPU, in any currency. `profile`: keep a trace of a few steps.
    """

    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 2
    resize_every_s: float = _later(60.0, gt=0)
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = _later("PACK")
    accelerator: str | None = _later(None)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    loader_processes: int = Field(0, ge=0)
    cache_gib: float = Field(1.0, ge=0)
    checkpoint_every_minutes: float = _later(10.0, gt=0)
    keep_checkpoints: int = _later(2, ge=1)
    max_failures: int = Field(2, ge=0)
    hang_timeout_s: float = _later(900.0, gt=0)
    price_per_hour: float | None = _later(None, ge=0)
    profile: bool = _later(False)

    @model_validator(mode="after")
    def _possible(self) -> ComputeSpec:
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers must be [min, max] with min <= max, got {list(self.workers_range)}")
        if self.placement == "STRICT_SPREAD" and self.min_workers < self.max_workers:
            raise ValueError(
                "placement STRICT_SPREAD needs a fixed number of workers: for a range Ray counts CPUs; use SPREAD"
            )
        if self.gpus_per_worker > 1:
            raise ValueError(f"a worker trains on one GPU: take more workers instead of {self.gpus_per_worker:g} each")
        if self.accelerator is not None and not self.gpus_per_worker:
            raise ValueError(f"accelerator {self.accelerator!r} needs gpus_per_worker above 0")
        return self

    @property
    def workers_range(self) -> tuple[int, int]:
        """The fewest and the most workers that the run may have."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.workers_range[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run makes use of."""
        return self.workers_range[1]


class RunSpec(_Section):
    """One cell of the matrix: an architecture, a dataset version, a recipe and a seed."""

    schema_version: Literal[1] = 1
    architecture: ArchitectureSpec
    dataset: DatasetSpec
    training: TrainingSpec = TrainingSpec()
    scoring: ScoringSpec = ScoringSpec()
    compute: ComputeSpec = ComputeSpec()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _resolved(self) -> RunSpec:
        if self.training.precision == "auto":
            raise ValueError("training.precision must be resolved before a run has an identity; use resolve_precision")
        if self.training.warm_start is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", self.training.warm_start):
            raise ValueError("training.warm_start must be resolved to sha256:<hex> before a run has an identity")
        return self

    @property
    def run_key(self) -> str:
        """12 hex digits that depend on all that changes the result, and on nothing else."""
        # The version already says which picture is in which split.
        told = {"description", "licence", "source", "sources", "splits"}
        identity = self.model_dump(mode="json", exclude={"scoring": True, "compute": True, "dataset": {"card": told}})
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]

    def with_warm_start(self, weights: str | None) -> RunSpec:
        """The same run, begun with other weights (`sha256:<hex>`), or with none."""
        return self.model_copy(update={"training": self.training.model_copy(update={"warm_start": weights})})

    @property
    def title(self) -> str:
        """Name for people: architecture, dataset, seed."""
        return f"{self.architecture.label} / {self.dataset.name} / seed {self.seed}"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; raises ValueError on NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def resolve_precision(precision: str, *, gpus_per_worker: float) -> Literal["bf16", "fp32"]:
    """`auto` becomes bf16 where a training step is faster in it, else fp32.

    Read from the machine that plans: a cluster is expected to be of one kind.
    """
    if precision == "auto":
        return "bf16" if gpus_per_worker > 0 or cpu_is_faster_in_bf16() else "fp32"
    return "bf16" if precision == "bf16" else "fp32"


def cpu_is_faster_in_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processors that Linux tells of there have matrix units for bf16, or AVX-512 with it at full width.

    Intel's AVX-512 alone multiplies bf16 no faster than fp32, and has to convert: steps took 4 to 40% longer.
    """
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words

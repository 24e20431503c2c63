"""`training.warm_start`: from a champion, a run or a file to weights that a run key can name."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flows.decisions import champion_of
from flows.evaluate import UnknownRun, find_result
from flows.experiment import Experiment
from flows.settings import Settings
from models.weights import from_public_yolox, is_public_yolox
from tracking.client import connect
from tracking.packaging import download_verified
from training.checkpoint import file_sha256
from training.records import Attempt
from training.spec import RunSpec
from training.state import BadFreeze, fit, warm_start_path

CHAMPION = "champion"
MIN_SHARE = 0.5
PUBLIC_SUFFIXES = {".pth", ".pt"}


class NoSuchWeights(ValueError):
    """`training.warm_start` names no weights that can be used."""


def specs_of(experiment: Experiment, dataset: str, version: str, settings: Settings) -> list[RunSpec]:
    """The cells of one dataset, each with what it starts from as `sha256:<hex>` of weights that lie in storage.

    A dataset without a champion, or with one of another architecture, starts cold.

    Raises:
        NoSuchWeights: the file is missing, damaged or more than tensors, no run of that key has finished, or the
            weights are not finite or fit less than half of an architecture.
        BadFreeze: a part that is frozen is not among the weights.
        DigestMismatch: the champion's files are not those that were registered.
        TrackingUnavailable, and what `flows.decisions.decisions` raises: the champion cannot be asked for.
    """
    asked = experiment.training_for(dataset).warm_start
    return experiment.cells({dataset: version}, _resolver(asked, settings) if asked else lambda _: None)


def _resolver(asked: str, settings: Settings) -> Callable[[RunSpec], str | None]:
    if asked == CHAMPION:
        earlier = _earlier_starts(settings)

        def follow(spec: RunSpec) -> str | None:
            # On unchanged data a cell keeps what it started from, whoever is champion since: retraining ends.
            return earlier[spec.run_key] if spec.run_key in earlier else _from_champion(spec, settings)

        return follow
    path = Path(asked).expanduser()
    if path.suffix or len(path.parts) > 1:
        if path.suffix not in {".safetensors", *PUBLIC_SUFFIXES} or not path.is_file():
            raise NoSuchWeights(
                f"training.warm_start={asked!r} must be a .safetensors or .pth file that exists, a run key, or "
                f"{CHAMPION!r}"
            )
        if path.suffix in PUBLIC_SUFFIXES:
            path = _from_pickle(path, settings)
    else:
        try:
            run_key = find_result(asked, settings).run_key
        except UnknownRun as error:
            raise NoSuchWeights(
                f"training.warm_start={asked!r} must be a .safetensors or .pth file, a run key or {CHAMPION!r}: {error}"
            ) from None
        path = settings.storage / run_key / "artifacts" / "weights.safetensors"

    _require_finite(path)

    def resolve(spec: RunSpec) -> str:
        share, frozen_without = fit(spec, path)
        if share < MIN_SHARE:
            raise NoSuchWeights(
                f"training.warm_start={asked!r} fits {share:.0%} of {spec.architecture.name}, and must fit at least "
                f"{MIN_SHARE:.0%}. Choose the architecture that the weights are of: --architectures"
            )
        if frozen_without:
            raise BadFreeze(
                f"training.freeze={list(spec.training.freeze)}: training.warm_start={asked!r} has nothing for "
                f"{len(frozen_without)} of the weights to keep, {frozen_without[0]} for one; freeze what it has"
            )
        return _keep(path, settings)

    return resolve


def _require_finite(path: Path) -> None:
    """Raise NoSuchWeights unless a file is whole safetensors whose numbers are all finite."""
    import torch
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as given:
            for name in given.keys():  # noqa: SIM118
                if not torch.isfinite(given.get_tensor(name)).all():
                    raise NoSuchWeights(f"{path}: {name} has values that are not finite. Give weights that can be used")
    except SafetensorError as error:
        raise NoSuchWeights(f"{path} is no safetensors file, or is damaged: {error}. Give a whole one") from None


def _from_pickle(path: Path, settings: Settings) -> Path:
    """Put the tensors of a .pth file among the weights in storage; no code in it is ever run.

    A YOLOX release checkpoint gets our names; other tensors keep theirs.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    # The training code of YOLOX keeps its best AP beside the weights, as a NumPy scalar, which NumPy 1 named otherwise.
    scalar: Any = np.float64(0).__reduce__()[0]
    numbers: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8")), scalar]
    try:
        with (
            torch.serialization.safe_globals([*numbers, (scalar, "numpy.core.multiarray.scalar")]),
            warnings.catch_warnings(action="ignore"),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever the bytes of a stranger make the unpickler raise.
        # Torch's own message says how to run the code in it.
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"refers to {code[1]}" if code else "is damaged, or more than tensors"
        raise NoSuchWeights(f"{path} {found}. Nothing in it was run. Give a checkpoint of tensors alone") from None
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        raise NoSuchWeights(f"{path} must hold a dictionary of plain tensors, or one under 'model' or 'state_dict'")
    if is_public_yolox(state):
        state = {from_public_yolox(name): value for name, value in state.items()}
    with tempfile.TemporaryDirectory(prefix="speck-warm-start-") as folder:
        converted = Path(folder) / "weights.safetensors"
        save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, converted)
        return warm_start_path(settings.storage, _keep(converted, settings))


def _is_plain(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _earlier_starts(settings: Settings) -> dict[str, str | None]:
    """What every cell that was ever begun started from, the latest time, by its run key without a warm start."""
    starts: dict[str, str | None] = {}
    for path in sorted(settings.storage.glob("*/attempts/*.json"), key=lambda path: path.stat().st_mtime_ns):
        with suppress(OSError, ValueError):  # Whose record is damaged: its own plan says so.
            spec = Attempt.model_validate_json(path.read_bytes()).spec
            starts[spec.with_warm_start(None).run_key] = spec.training.warm_start
    return starts


def _from_champion(spec: RunSpec, settings: Settings) -> str | None:
    client = connect(settings.tracking_uri)
    holder = champion_of(client, settings, spec.dataset.name)
    if holder is None or holder.architecture != spec.architecture.name:
        return None
    with tempfile.TemporaryDirectory(prefix="speck-warm-start-") as folder:
        artifacts = download_verified(client, spec.dataset.name, holder.version, Path(folder)) / "artifacts"
        own = RunSpec.model_validate_json((artifacts / "spec.json").read_bytes())
        if own.architecture != spec.architecture:
            return None
        # The champion came out of this very cell, or of its twin with another seed: whoever starts from it again
        # would train for ever on unchanged data.
        twin = own.with_warm_start(None).model_copy(update={"seed": spec.seed})
        if twin.run_key == spec.with_warm_start(None).run_key:
            return own.training.warm_start
        return _keep(artifacts / "weights.safetensors", settings)


def _keep(weights: Path, settings: Settings) -> str:
    """Copy weights to where all workers find them; what they start from must outlive the run it came from."""
    name = f"sha256:{file_sha256(weights)}"
    target = warm_start_path(settings.storage, name)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
            shutil.copyfile(weights, partial.name)
        # Private until here; workers may be other users.
        Path(partial.name).chmod(0o644)
        Path(partial.name).replace(target)
    return name

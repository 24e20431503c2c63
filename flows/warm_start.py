"""`training.warm_start`: from a champion, a run or a file to weights that a run key can name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from flows.evaluate import find_result
from flows.settings import Settings
from tracking.client import connect
from tracking.registry import champion, download
from training.checkpoint import file_sha256
from training.spec import RunSpec
from training.state import warm_start_path

CHAMPION = "champion"


class NoSuchWeights(ValueError):
    """`training.warm_start` names no weights that can be used."""


def resolver(asked: str, settings: Settings) -> Callable[[RunSpec], str | None]:
    """What each cell starts from, as `sha256:<hex>` of weights that lie in storage, or None for a cold start.

    `asked` is `champion`, the key of a finished run, or a safetensors file. A dataset without a champion, or with one
    of another architecture, starts cold.

    Raises (when called):
        NoSuchWeights: the file is missing or not safetensors.
        UnknownRun: no run of that key has finished.
        TrackingUnavailable: the champion cannot be asked for.
    """
    if asked == CHAMPION:
        return lambda spec: _from_champion(spec, settings)
    path = Path(asked).expanduser()
    if path.suffix or len(path.parts) > 1:
        if path.suffix != ".safetensors" or not path.is_file():
            raise NoSuchWeights(
                f"training.warm_start={asked!r} must be a .safetensors file that exists, a run key, or {CHAMPION!r}"
            )
        kept = _keep(path, settings)
    else:
        result = find_result(asked, settings)
        kept = _keep(settings.storage / result.run_key / "artifacts" / "weights.safetensors", settings)
    return lambda _: kept


def _from_champion(spec: RunSpec, settings: Settings) -> str | None:
    client = connect(settings.tracking_uri)
    holder = champion(client, spec.dataset.name)
    if holder is None or holder.architecture != spec.architecture.name:
        return None
    with tempfile.TemporaryDirectory(prefix="speck-warm-start-") as folder:
        download(client, holder, ("spec.json", "weights.safetensors"), Path(folder))
        own = RunSpec.model_validate_json((Path(folder) / "spec.json").read_bytes())
        # The champion came out of this very cell: to start from it again would train for ever on unchanged data.
        if own.with_warm_start(None).run_key == spec.with_warm_start(None).run_key:
            return own.training.warm_start
        return _keep(Path(folder) / "weights.safetensors", settings)


def _keep(weights: Path, settings: Settings) -> str:
    """Copy weights to where all workers find them; what they start from must outlive the run it came from."""
    name = f"sha256:{file_sha256(weights)}"
    target = warm_start_path(settings.storage, name)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
            shutil.copyfile(weights, partial.name)
        Path(partial.name).replace(target)
    return name

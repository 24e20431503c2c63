"""Score a finished run again, without training: another split, or a newer version of its dataset."""

from __future__ import annotations

from typing import Literal

from data.store import default_root, materialise
from evaluation.result import ScoreResult
from flows.settings import Settings
from training.records import RunResult, read_result
from training.scoring import score_split
from training.state import build_model
from training.workers import Workers


class UnknownRun(LookupError):
    """No finished run has this key."""


def find_result(run_key: str, settings: Settings) -> RunResult:
    """The finished run whose key starts with `run_key`.

    Raises:
        UnknownRun: none or several do.
    """
    finished = sorted(path.parent.name for path in settings.storage.glob("*/result.json"))
    matching = [name for name in finished if name.startswith(run_key)]
    if len(matching) != 1:
        found = "several do" if matching else "none does"
        raise UnknownRun(
            f"{run_key!r} must begin the key of exactly one finished run; {found}. Finished: "
            f"{', '.join(finished) or 'none; train one with `speck train`'}"
        )
    result = read_result(settings.storage / matching[0])
    assert result is not None
    return result


def score_run(
    result: RunResult,
    settings: Settings,
    *,
    split: Literal["val", "test"] = "test",
    dataset_version: str | None = None,
) -> ScoreResult:
    """Score a run's weights on one split in this process."""
    from safetensors.torch import load_file

    spec = result.spec
    if dataset_version is not None:
        dataset = spec.dataset.model_copy(update={"version": dataset_version})
        spec = spec.model_copy(update={"dataset": dataset})
    folder = materialise(spec.dataset.name, spec.dataset.version, source=settings.data_source, root=default_root())
    model = build_model(spec)
    model.load_state_dict(load_file(settings.storage / result.run_key / "artifacts" / "weights.safetensors"))
    scored = score_split(spec, model, folder, split, Workers.current())
    assert scored is not None
    return scored.result.model_copy(update={"run_key": result.run_key})

"""Score a finished run again, without training: another split, other rules, or a newer version of its dataset."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data.store import default_max_bytes, default_root, materialise
from flows.settings import Settings
from training.records import RunResult, hash_files, read_result, write_result
from training.scoring import Scored, Split, score_split, write_artifacts
from training.spec import RunSpec
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
    spec: RunSpec, weights: Path, settings: Settings, splits: Sequence[Split]
) -> tuple[nn.Module, dict[Split, Scored]]:
    """Score weights on the spec's dataset version under its scoring rules, in this process."""
    from safetensors.torch import load_file

    folder = dataset_folder(spec, settings)
    workers = Workers.current(on_gpu=torch.cuda.is_available())
    model = build_model(spec)
    model.load_state_dict(load_file(weights))
    model.to(workers.device)
    scored: dict[Split, Scored] = {}
    for split in splits:
        found = score_split(spec, model, folder, split, workers)
        assert found is not None  # a group of one has rank 0
        scored[split] = found
    return model, scored


def score_again(result: RunResult, spec: RunSpec, settings: Settings) -> RunResult:
    """Score a finished run under the scoring rules of `spec`, and put the new scores in the place of the old."""
    run_folder = settings.storage / result.run_key
    started = time.monotonic()
    model, scored = score_run(spec, run_folder / "artifacts" / "weights.safetensors", settings, ("val", "test"))
    seconds = {**result.seconds, "score_again": time.monotonic() - started}
    write_artifacts(spec, model.state_dict(), scored, seconds, dataset_folder(spec, settings), run_folder)
    new = result.model_copy(
        update={
            "spec": spec,
            "scores": {split: found.result for split, found in scored.items()},
            "files": hash_files(run_folder, run_folder / "artifacts"),
            "seconds": seconds,
        }
    )
    write_result(run_folder, new)
    return new


def dataset_folder(spec: RunSpec, settings: Settings) -> Path:
    """This node's copy of the spec's dataset version."""
    return materialise(
        spec.dataset.name,
        spec.dataset.version,
        source=settings.data_source,
        root=default_root(),
        max_bytes=default_max_bytes(),
    )

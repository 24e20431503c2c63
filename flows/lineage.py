"""From a finished run back to what it came from: what must be known, and whether all that is known agrees."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flows.find_model import WEIGHTS
from flows.settings import Settings
from tracking.packaging import DigestMismatch, download_verified
from tracking.runs import RUN_KEY, Recorded, artifact_sums
from training.records import RunResult, read_attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMMIT = "mlflow.source.git.commit"
CODE_HASH = "speck.code_hash"


def lineage_faults(
    client: MlflowClient,
    result: RunResult,
    recorded: Recorded,
    version: int | None,
    settings: Settings,
) -> tuple[str, ...]:
    """What lacks in a run's lineage or contradicts it, a few words each; nothing if it is complete.

    Run key, commit, dataset version, code hash, weights, the record of the training in MLflow, and the digest of the
    registered `version`'s files, None where nothing is registered yet.
    """
    return (
        *_of_result(result, settings),
        *_of_record(client, result, recorded, settings),
        *_of_model(client, result.spec.dataset.name, version),
    )


def unsent(result: RunResult, recorded: Recorded, metric: str) -> tuple[str, ...]:
    """In what MLflow differs from a run that was scored again while it was away; nothing where it has the score."""
    score = result.scores["test"].metrics.get(metric)
    if score is None or any(math.isclose(value, score, abs_tol=1e-9) for value in recorded.values):
        return ()
    return (f"its MLflow run has test {metric} {', '.join(map(str, recorded.values)) or 'nowhere'}, not {score}",)


def _of_result(result: RunResult, settings: Settings) -> Iterator[str]:
    folder = settings.storage / result.run_key
    if result.spec.run_key != result.run_key:
        yield f"the spec's run key is {result.spec.run_key}, not {result.run_key}"
    try:
        attempt = read_attempt(folder, result.attempts)
    except (OSError, ValueError):
        yield f"the record of attempt {result.attempts} is missing or damaged"
        return
    if attempt.spec.run_key != result.run_key:
        yield f"attempt {result.attempts} trained {attempt.spec.run_key}"
    if attempt.code_hash != result.code_hash:
        yield f"attempt {result.attempts} ran code {attempt.code_hash[:12]}, the result is of {result.code_hash[:12]}"
    if attempt.provenance.get(COMMIT, "unknown") == "unknown":
        yield "the commit is not known: train in a git checkout with a commit"
    try:
        kept = json.loads((folder / "artifacts" / "score_test.json").read_bytes())
    except (OSError, ValueError):
        yield "score_test.json is missing or damaged"
        return
    if kept != result.scores["test"].model_dump(mode="json"):
        yield "result.json and score_test.json tell different scores"


def _of_record(client: MlflowClient, result: RunResult, recorded: Recorded, settings: Settings) -> Iterator[str]:
    wanted = {RUN_KEY: result.run_key, "dataset_version": result.spec.dataset.version}
    for tag, value in wanted.items():
        if recorded.tags.get(tag) != value:
            yield f"its MLflow run has {tag} {recorded.tags.get(tag)}, not {value}"
    # MLflow has that of the attempt that began the run; one that was resumed may have gone on by other code.
    hashes = _code_hashes(settings.storage / result.run_key)
    if recorded.tags.get(CODE_HASH) not in hashes:
        yield f"its MLflow run has {CODE_HASH} {recorded.tags.get(CODE_HASH)}, which no attempt ran"
    # Scores and reports may be made again, weights may not: a result that was rewritten with them is found here.
    if artifact_sums(client, recorded.run_id).get(WEIGHTS) != result.files.get(f"artifacts/{WEIGHTS}"):
        yield f"its MLflow run has another {WEIGHTS}"


def _code_hashes(run_folder: Path) -> set[str]:
    found = set()
    for path in (run_folder / "attempts").glob("*.json"):
        with suppress(OSError, ValueError):
            found.add(read_attempt(run_folder, int(path.stem)).code_hash)
    return found


def _of_model(client: MlflowClient, name: str, version: int | None) -> Iterator[str]:
    if version is None:
        return
    with tempfile.TemporaryDirectory(prefix="speck-verified-") as folder:
        try:
            download_verified(client, name, version, Path(folder))
        except DigestMismatch as error:
            yield str(error)

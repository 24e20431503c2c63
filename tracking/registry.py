"""The model registry: one registered model per dataset, its versions and their aliases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.client import speaks_to_store
from tracking.model_card import MAX_DESCRIPTION, as_description
from tracking.packaging import CARD, DIGEST, digest
from tracking.runs import RUN_KEY, upload

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"
ARCHITECTURE = "speck.architecture"
DATASET_VERSION = "speck.dataset_version"
VERDICT = "speck.verdict"
REASON = "speck.reason"
SCORE_PREFIX = "speck.score."
# Parts a verdict from the card in a version's description.
BELOW_VERDICT = "\n\n---\n\n"


@dataclass(frozen=True)
class Version:
    """One registered version; `scores` are test scores by metric name, `tags` everything else that was recorded."""

    version: int
    run_key: str
    run_id: str
    created_ms: int
    aliases: tuple[str, ...]
    scores: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The digest of the packaged folder, `""` if none was recorded."""
        return self.tags.get(DIGEST, "")

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return self.tags.get(ARCHITECTURE, "")

    @property
    def dataset_version(self) -> str:
        """DVC hash of the dataset that the model was trained and tested on."""
        return self.tags.get(DATASET_VERSION, "")

    @property
    def verdict(self) -> str:
        """`promoted`, `rejected`, or `""` before a decision."""
        return self.tags.get(VERDICT, "")

    @property
    def reason(self) -> str:
        """Why it was promoted or rejected."""
        return self.tags.get(REASON, "")


@speaks_to_store
def register(
    client: MlflowClient,
    *,
    model_name: str,
    run_id: str,
    run_key: str,
    model_folder: Path,
    tags: Mapping[str, str],
    scores: Mapping[str, float],
) -> int:
    """The version number of the run in `model_name`: the one that exists, else a new one from `model_folder`.

    The folder becomes an artifact of the run, in a directory named by its digest, so that a half-finished upload
    of another packaging can never mix with it. Its model card becomes the version's description.
    Raises ValueError for a score that is not finite.
    """
    for metric, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"score {metric!r} is {score}: only finite scores can be registered. Score it again")
    _ensure_model(client, model_name)
    for version in history(client, model_name):
        if version.run_id == run_id:
            return version.version
    folder_digest = digest(model_folder)
    artifact_path = f"model-{folder_digest[:12]}"
    upload(client, run_id, model_folder, artifact_path)
    all_tags = {
        **tags,
        **{f"{SCORE_PREFIX}{metric}": repr(float(score)) for metric, score in scores.items()},
        RUN_KEY: run_key,
        DIGEST: folder_digest,
    }
    source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{artifact_path}"
    card = model_folder / CARD
    description = as_description(card.read_text(encoding="utf-8"), folder_digest) if card.is_file() else None
    created = client.create_model_version(model_name, source, run_id, tags=all_tags, description=description)
    return int(created.version)


@speaks_to_store
def history(client: MlflowClient, model_name: str) -> list[Version]:
    """All versions of `model_name`, newest first; empty when nothing was registered."""
    aliases = _aliases(client, model_name)
    if aliases is None:
        return []
    found = [_version(version, aliases) for version in _search(client, f"name = '{model_name}'")]
    return sorted(found, key=lambda version: version.version, reverse=True)


@speaks_to_store
def all_versions(client: MlflowClient) -> list[Version]:
    """All versions of all models, in no order, without their aliases."""
    return [_version(version, {}) for version in _search(client, None)]


def _search(client: MlflowClient, query: str | None) -> list[Any]:
    found: list[Any] = []
    token = None
    while token or not found:
        page = client.search_model_versions(query, max_results=1000, page_token=token)
        found += page
        if not (token := page.token):
            break
    return found


@speaks_to_store
def record_verdict(client: MlflowClient, model_name: str, version: int, *, promoted: bool, reason: str) -> None:
    """Keeps the decision about a version beside it."""
    client.set_model_version_tag(model_name, str(version), VERDICT, "promoted" if promoted else "rejected")
    client.set_model_version_tag(model_name, str(version), REASON, reason)


@speaks_to_store
def show_verdict(client: MlflowClient, model_name: str, version: int, markdown: str) -> None:
    """Shows the latest verdict on the version's page, above its card; both are cut where MLflow allows no more."""
    found = client.get_model_version(model_name, str(version))
    card = (found.description or "").rpartition(BELOW_VERDICT)[2]
    if len(markdown) > MAX_DESCRIPTION // 2:
        rows, end, _ = markdown[: MAX_DESCRIPTION // 2].rpartition("|\n")
        markdown = f"{rows}{end}\n... (`speck history` has all)"
    text = as_description(f"{markdown}{BELOW_VERDICT}{card}", found.tags.get(DIGEST, ""))
    client.update_model_version(model_name, str(version), text)


@speaks_to_store
def move_alias(client: MlflowClient, model_name: str, alias: str, version: int | None) -> None:
    """Puts an alias on `version`, or on none. Who may decide that is `tracking.authority`'s matter."""
    if version is None:
        client.delete_registered_model_alias(model_name, alias)
    else:
        client.set_registered_model_alias(model_name, alias, str(version))


def _ensure_model(client: MlflowClient, model_name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _aliases(client: MlflowClient, model_name: str) -> dict[str, int] | None:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(model_name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return {alias: int(version) for alias, version in aliases.items()}


def _version(found: Any, aliases: Mapping[str, int]) -> Version:
    number = int(found.version)
    scores = {k.removeprefix(SCORE_PREFIX): float(v) for k, v in found.tags.items() if k.startswith(SCORE_PREFIX)}
    return Version(
        version=number,
        run_key=found.tags.get(RUN_KEY, ""),
        run_id=found.run_id or "",
        created_ms=int(found.creation_timestamp),
        aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
        scores=scores,
        tags={key: value for key, value in found.tags.items() if not key.startswith(SCORE_PREFIX)},
    )

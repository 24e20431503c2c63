from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tracking.registry import ARCHITECTURE, all_versions, champion, history, promote, record_verdict, register
from tracking.runs import DatasetRef, ensure_run

DATASET = DatasetRef("dots", "0" * 32 + ".dir", "/srv/dots", {"test": 3})


def registered(client: Any, model_name: str, run_key: str, folder: Path, score: float = 0.5) -> int:
    run_id = ensure_run(
        client, experiment=model_name, run_key=run_key, training_id=run_key, name="x", params={}, tags={},
        dataset=DATASET, start_time_ms=1,
    )  # fmt: skip
    return register(
        client,
        model_name=model_name,
        run_id=run_id,
        run_key=run_key,
        model_folder=folder,
        tags={ARCHITECTURE: "yolox-nano"},
        scores={"coco/AP": score},
    )


def test_nothing_registered_is_no_champion_and_no_history(client: Any) -> None:
    assert champion(client, "unheard-of") is None
    assert history(client, "unheard-of") == []


def test_a_run_key_is_registered_once_even_when_packaged_again(client: Any, files: Path) -> None:
    first = registered(client, "once", "aaa", files, score=0.1 + 0.2)
    (files / "spec.json").write_text("[]")
    assert registered(client, "once", "aaa", files) == first
    assert registered(client, "once", "bbb", files) == first + 1
    newest, oldest = history(client, "once")
    assert (newest.version, newest.run_key, newest.architecture) == (first + 1, "bbb", "yolox-nano")
    assert (oldest.version, oldest.run_key, oldest.scores) == (first, "aaa", {"coco/AP": 0.1 + 0.2})
    assert oldest.digest != newest.digest


def test_promotion_moves_both_aliases_and_repeating_it_changes_nothing(client: Any, files: Path) -> None:
    versions = [registered(client, "promoted", key, files) for key in ("aaa", "bbb")]
    assert champion(client, "promoted") is None
    promote(client, "promoted", versions[0])
    for _ in range(2):
        promote(client, "promoted", versions[1])
    holder = champion(client, "promoted")
    assert holder is not None
    assert holder.run_key == "bbb"
    assert {version.run_key: version.aliases for version in history(client, "promoted")} == {
        "bbb": ("champion",),
        "aaa": ("previous",),
    }


def test_all_versions_are_those_of_every_model(client: Any, files: Path) -> None:
    for model_name in ("one", "other"):
        registered(client, model_name, f"key-of-{model_name}", files)
    assert {version.run_key for version in all_versions(client)} >= {"key-of-one", "key-of-other"}


def test_a_verdict_is_kept_beside_its_version(client: Any, files: Path) -> None:
    version = registered(client, "judged", "aaa", files)
    record_verdict(client, "judged", version, promoted=False, reason="0.5 does not beat 0.6")
    (entry,) = history(client, "judged")
    assert (entry.verdict, entry.reason) == ("rejected", "0.5 does not beat 0.6")


def test_a_score_that_is_not_finite_is_not_registered(client: Any, files: Path) -> None:
    with pytest.raises(ValueError, match="coco/AP"):
        registered(client, "unscored", "aaa", files, score=math.nan)
    assert history(client, "unscored") == []

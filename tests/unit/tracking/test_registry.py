from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tracking.model_card import MAX_DESCRIPTION, as_description
from tracking.registry import ARCHITECTURE, all_versions, history, record_verdict, register, show_verdict
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


def test_a_verdict_stands_above_the_card_and_a_later_one_takes_its_place(client: Any, files: Path) -> None:
    version = registered(client, "told", "aaa", files)
    digest = history(client, "told")[0].digest

    def shown(verdict: str) -> str:
        show_verdict(client, "told", version, verdict)
        return str(client.get_model_version("told", str(version)).description)

    client.update_model_version("told", str(version), as_description("# Card\n\ntext\n", digest))
    below = f"\n\n---\n\n# Card\n\ntext\n\nDigest of the model's files: `{digest}`\n"
    assert [shown(verdict) for verdict in ("rejected", "promoted")] == [f"rejected{below}", f"promoted{below}"]
    long = shown("promoted\n\n" + "| AP of a class | 0.1 | 0.2 | 0.3 | pass |\n" * 200)
    assert len(long) <= MAX_DESCRIPTION
    assert long.endswith(below)
    assert "| pass |\n\n... (`speck history` has all)" in long
    client.update_model_version("told", str(version), as_description("# Card\n\n" + "line\n" * 2000, digest))
    long = shown("| promoted |\n" * 300)
    assert len(long) <= MAX_DESCRIPTION
    assert long.endswith(f"model_card.md among the model's files.\n\nDigest of the model's files: `{digest}`\n")
    assert shown("rejected").startswith("rejected\n\n---\n\n# Card\n\nline\nline")


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

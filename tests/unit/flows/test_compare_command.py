from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from data.card import DatasetCard
from data.splits import SplitRule
from evaluation.significance import NotComparable
from flows.cli import app, is_expected
from flows.compare import compare_runs, group_images
from flows.evaluate import find_result
from flows.settings import Settings
from training.checkpoint import write_json
from training.ledger import UsageLog
from training.records import RunResult, hash_files, record_attempt, write_result
from training.scoring import read_ground_truth
from training.spec import RunSpec, ScoringSpec
from training.store import FolderStore

Finish = Callable[..., str]


@pytest.fixture
def finish(
    settings: Settings,
    tiny: Any,
    make_result: Callable[..., RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Finish:
    """Leaves a finished run behind that detected a share of the objects exactly; gives its run key."""
    monkeypatch.setenv("SPECK_DATA_SOURCE", tiny.source)
    monkeypatch.setenv("SPECK_STORE", str(tmp_path / "store"))

    def make(spec: RunSpec, share: float) -> str:
        folder = settings.storage / spec.run_key
        (folder / "artifacts").mkdir(parents=True)
        for split in ("val", "test"):
            truth = json.loads((tiny.folder / "annotations" / f"{split}.json").read_text())
            rng = np.random.default_rng(0)
            found = [
                {key: box[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
                for box in truth["annotations"]
                if rng.uniform() < share
            ]
            (folder / "artifacts" / f"detections_{split}.json").write_text(json.dumps(found))
        write_result(folder, make_result(spec, 0.5, 0.5, files=hash_files(folder, folder / "artifacts")))
        return spec.run_key

    return make


def speck(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", "tiny-squares", *arguments], env={"COLUMNS": "160"})


def test_a_run_that_finds_all_is_better_than_one_that_finds_some(
    finish: Finish, tiny_spec: Callable[..., RunSpec]
) -> None:
    spec = tiny_spec(seed=0)
    some, everything = finish(spec, 0.3), finish(tiny_spec(seed=1), 1.0)
    answer = speck(some[:6], everything, "--samples", "200")
    assert answer.exit_code == 0
    assert f"A: {spec.title}, run {some}" in answer.output
    (row,) = re.findall(
        r"│ coco/AP +│ *([\d.]+) │ 1\.0000 │ \+([\d.]+) │ \+[\d.]+ to \+[\d.]+ │ +9[\d.]+% │ better", answer.output
    )
    assert float(row[0]) + float(row[1]) == pytest.approx(1, abs=1e-3)
    assert re.search(r"│ coco/AP_large +│ +- │ +- │ +│ +│ +│ no ground truth", answer.output)
    assert re.search(r"│ bright: coco/AP50 +│", answer.output)
    assert answer.output.startswith("the runs that were named\n")
    # Seeds differ, the rest does not; of attempts there is no record.
    assert re.search(r"│ parameters │ seed +│ 0 +│ 1 +│", answer.output)
    assert re.search(rf"│ data +│ version +│ {spec.dataset.version} +│ {spec.dataset.version} +│", answer.output)
    assert re.search(r"│ +│ images of test +│ 8 +│ 8 +│", answer.output)
    assert re.search(r"│ code +│ training code +│ c0de +│ c0de +│", answer.output)
    assert re.search(r"│ cost +│ attempts +│ 1 +│ 1 +│", answer.output)
    notes = answer.output[answer.output.rindex("┘") + 1 :].strip().splitlines()
    assert notes[0] == "resampled: 8 images (the card tells of no sequences), 200 times, seed 0"
    assert notes[1] == "warning: of only 8 images, fewer than 20, these intervals say little"
    assert notes[-1].startswith("an interval sees which pictures were scored, not what another training seed")


def test_a_page_shows_where_they_differ(finish: Finish, tiny_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    some, everything = finish(tiny_spec(seed=0), 0.3), finish(tiny_spec(seed=1), 1.0)
    folder = tmp_path / "new" / "out"
    printed = json.loads(speck(some, everything, "--samples", "20", "--json", "--out", str(folder)).stdout)
    assert printed.pop("why") == "the runs that were named"
    assert json.loads((folder / "comparison.json").read_text()) == printed
    page = (folder / "comparison.html").read_text()
    assert some in page
    assert page.count("data:image/jpeg") > 2
    assert '<tr><th scope="row">seed</th><td>0</td><td>1</td></tr>' in page
    assert re.findall("<h2>(.*?)</h2>", page)[2:] == [
        "Parameters",
        "Data",
        "Code",
        "Cost",
        "Objects",
        "Where they differ",
    ]
    assert "· test</code>" in page
    assert all(f'<p class="reading">{escape(note)}</p>' in page for note in printed["notes"])
    assert any(note.startswith("warning: of only 8 images") for note in printed["notes"])
    assert page.count(": coco/AP50</th>") == sum(
        row["coco/AP50"]["low"] is not None for row in printed["per_class"].values()
    )
    found = printed["metrics"]["coco/AP"]
    assert f"<td>{found['difference']:+.3f}</td><td>{found['low']:+.3f} to {found['high']:+.3f}</td>" in page


def test_json_is_the_same_comparison(finish: Finish, tiny_spec: Callable[..., RunSpec]) -> None:
    some, everything = finish(tiny_spec(seed=0), 0.3), finish(tiny_spec(seed=1), 1.0)
    first, again, other = (
        json.loads(speck(everything, some, "--json", "--samples", "50", "--split", "val", "--seed", seed).stdout)
        for seed in "114"
    )
    assert first == again
    assert first["runs"] == [everything, some]
    assert first["differences"]["parameters"] == [{"name": "seed", "first": "1", "second": "0"}]
    assert (first["split"], first["num_groups"], first["resampled"], first["num_samples"]) == ("val", 8, "images", 50)
    ap = first["metrics"]["coco/AP"]
    assert (ap["verdict"], ap["first"], ap["share_better"]) == ("worse", 1.0, 0.0)
    assert ap["low"] <= ap["difference"] <= ap["high"] < 0
    assert other["metrics"]["coco/AP"]["low"] != ap["low"]


def test_runs_under_other_rules_are_refused_and_other_detection_options_are_told(
    finish: Finish, tiny_spec: Callable[..., RunSpec]
) -> None:
    spec = tiny_spec()
    version = spec.dataset.model_copy(update={"version": "0" * 32})
    base = finish(spec, 1.0)
    for other, message in (
        (spec.model_copy(update={"dataset": version, "seed": 1}), f"dataset version ({spec.dataset.version} and 000"),
        (tiny_spec(seed=2, scoring=ScoringSpec(max_dets=500)), "max_dets (100 and 500)"),
        (with_card(tiny_spec(seed=4), protocol="voc"), "protocol (coco and voc)"),
    ):
        error = speck(base, finish(other, 1.0)).exception
        assert isinstance(error, NotComparable)
        assert is_expected(error)
        assert message in str(error)
    finer = finish(tiny_spec(seed=3, scoring=ScoringSpec(nms_iou=0.5)), 1.0)
    answer = speck(base, finer, "--samples", "10")
    assert "detected under different options, which is part of the difference: nms_iou 0.65 and 0.5" in answer.output
    assert speck(base, finer, "--split", "train").exit_code == 2
    assert speck(base, finer, "--samples", "0").exit_code == 2


def with_card(spec: RunSpec, **changes: Any) -> RunSpec:
    card = spec.dataset.card.model_copy(update=changes)
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})


def test_runs_are_compared_by_sequences_and_by_the_dataset_s_own_protocol(
    finish: Finish, tiny_spec: Callable[..., RunSpec]
) -> None:
    # Pictures 000 to 003 are a sequence each, 004 to 007 are one.
    by_sequence = SplitRule(rule="by-sequence", sequence=r"-00([0-3])?")
    some, everything = (
        finish(with_card(tiny_spec(seed=seed), protocol="voc", splits=by_sequence), share)
        for seed, share in ((0, 0.3), (1, 1.0))
    )
    compared = json.loads(speck(some, everything, "--json", "--samples", "20").stdout)
    assert (compared["num_groups"], compared["num_images"], compared["resampled"]) == (5, 8, "sequences")
    assert compared["metrics"]["voc/mAP50"]["second"] == 1.0
    assert {"coco/AP", "voc/AP50"} <= compared["per_class"]["bright"].keys()


def test_the_page_shows_what_each_run_s_own_threshold_leaves(
    finish: Finish, settings: Settings, tiny_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    keys = [finish(tiny_spec(seed=seed), 1.0) for seed in (0, 1)]
    artifacts = settings.storage / keys[1] / "artifacts"
    # All detections have a score of 0.9.
    chosen = {"score": 0.95, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    write_json(artifacts / "operating_point.json", {"overall": chosen, "per_class": {}})
    assert speck(*keys, "--samples", "10", "--out", str(tmp_path)).exit_code == 0
    page = (tmp_path / "comparison.html").read_text()
    assert re.findall(r"scores from ([\d.]+)", page) == ["0.300", "0.950"]
    found_by_both, only_by_first = re.findall(r"(?:found by both|only by [^<]*)</t[hd]><td[^>]*>(\d+)<", page)[:2]
    assert (found_by_both, int(only_by_first) > 0) == ("0", True)


def test_what_the_ignore_rule_takes_out_is_neither_scored_nor_shown(
    finish: Finish, tiny_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_ignored(*arguments: Any) -> dict[str, Any]:
        truth = read_ground_truth(*arguments)
        images = [image | {"ignore_regions_xywh": [[0, 0, 64, 64]]} for image in truth["images"]]
        return truth | {"images": images}

    monkeypatch.setattr("flows.compare.read_ground_truth", all_ignored)
    settings = Settings()
    runs = [find_result(finish(tiny_spec(seed=seed), share), settings) for seed, share in ((0, 0.3), (1, 1.0))]
    assert compare_runs(*runs, settings, "val", num_samples=5, out=tmp_path).headline == "val: no ground truth"
    assert "No image has another outcome." in (tmp_path / "comparison.html").read_text()


def test_frames_of_a_sequence_are_drawn_together(tiny: Any) -> None:
    names = ["M0101/img000001.jpg", "M0203/img000001.jpg", "M0101/img000002.jpg"]

    def card(**changes: Any) -> DatasetCard:
        return tiny.card.model_copy(update=changes)

    by_rule = SplitRule(rule="by-sequence", sequence=r"(M\d{4})/[^/]+$")
    assert group_images(names, card(splits=by_rule))[:2] == ([0, 1, 0], "sequences")
    whole_match = SplitRule(rule="by-sequence", sequence=r"M\d\d")
    assert group_images(names, card(splits=whole_match)).groups == [0, 1, 0]
    assert group_images(names, card(format="uavdt"))[:] == ([0, 1, 0], "sequences", "by folder")
    assert group_images(names, card())[:2] == ([0, 1, 2], "images")
    as_given = SplitRule(rule="given", sequence=r"M(\d{4})")
    assert group_images(names, card(splits=as_given)).groups == [0, 1, 0]
    with pytest.raises(NotComparable, match=r"'night\.png' does not match the card's"):
        group_images(["night.png"], card(splits=by_rule))


@pytest.mark.parametrize("change", [{"flip": True}, {"tiling": {"size_px": 64, "overlap_px": 8}}])
def test_options_that_only_one_of_the_two_has_are_told(
    finish: Finish, tiny_spec: Callable[..., RunSpec], change: dict[str, Any]
) -> None:
    scoring = ScoringSpec.model_validate(change)
    usual, other = finish(tiny_spec(seed=0), 1.0), finish(tiny_spec(seed=1, scoring=scoring), 1.0)
    for pair in ((usual, other), (other, usual)):
        answer = speck(*pair, "--samples", "5")
        assert answer.exit_code == 0, answer.exception
        assert f"which is part of the difference: {next(iter(change))} " in answer.output


def test_without_runs_the_best_two_are_chosen_and_that_is_told(
    finish: Finish, tiny_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    keys = {finish(tiny_spec(seed=seed), share) for seed, share in ((0, 0.3), (1, 1.0))}
    answer = speck("--samples", "5", "--out", str(tmp_path))
    assert answer.exit_code == 0, answer.output
    assert answer.output.startswith("the best two of tiny-squares by val; no champion is registered\n")
    assert set(re.findall(r"run ([0-9a-f]{12})", answer.output)) == keys
    assert f"in pictures: {tmp_path / 'comparison.html'}" in answer.output


@pytest.mark.parametrize(
    ("dataset", "num_runs", "words"),
    [("tiny-squares", 1, "name two runs after their dataset"), ("other", 2, "is of tiny-squares, not of other")],
)
def test_a_dataset_and_two_of_its_runs_have_to_be_named(
    finish: Finish, tiny_spec: Callable[..., RunSpec], dataset: str, num_runs: int, words: str
) -> None:
    keys = [finish(tiny_spec(seed=seed), 1.0) for seed in range(2)]
    answer = CliRunner().invoke(app, ["compare", dataset, *keys[:num_runs]], env={"COLUMNS": "160"})
    assert answer.exit_code == 2
    assert words in answer.output


def test_what_ran_where_and_at_what_cost_is_compared(
    finish: Finish, settings: Settings, tiny_spec: Callable[..., RunSpec]
) -> None:
    keys = [finish(tiny_spec(seed=seed), 1.0) for seed in range(2)]
    for key, dirty in zip(keys, ("True", "False"), strict=True):
        told = {"mlflow.source.git.commit": "a" * 40, "speck.dirty": dirty}
        spec = find_result(key, settings).spec
        attempt = record_attempt(settings.storage / key, spec, data_source="", code_hash="c", provenance=told)
        UsageLog(FolderStore(settings.storage / key), attempt, 2, print).close()
    facts = json.loads(speck(*keys, "--samples", "5", "--json").stdout)["differences"]
    commit = next(fact for fact in facts["code"] if fact["name"] == "commit")
    assert (commit["first"], commit["second"]) == (f"{'a' * 12} with changes (attempts/001/dirty.diff)", "a" * 12)
    assert {"CPU hours held", "of them useful", "starts of workers"} <= {fact["name"] for fact in facts["cost"]}

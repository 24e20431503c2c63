"""`speck evaluate`: what it takes for a model, under which rules it scores, and what it prints and writes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flows.find_model
from data.tiling import TileGrid, Tiling
from evaluation.coco import score
from evaluation.detector import Detected
from evaluation.foreground import ObjectScore
from evaluation.result import ScoreResult
from flows.cli import main
from flows.evaluate import BadScoring, UnknownRun, _Pace, find_result, score_again, with_rules
from flows.find_model import FoundModel, OtherClasses, UnknownModel, UnpreparedDataset, find_model
from flows.settings import Settings
from tracking.registry import Version
from training.checkpoint import file_sha256, write_json
from training.scoring import load_model, score_options
from training.spec import RunSpec
from training.state import UnfitWeights

MakeSpec = Callable[..., RunSpec]
NAME = "tiny-squares"


@pytest.fixture
def evaluate(
    run: RunSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["speck", "evaluate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def found(name: str, settings: Settings, **options: Any) -> FoundModel:
    with find_model(name, settings, **options) as model:
        return model


def test_a_run_is_scored_and_written_as_coco_results(
    evaluate: Callable[..., Any], run: RunSpec, tiny: Any, tmp_path: Path
) -> None:
    code, out, err = evaluate(run.run_key[:6], "--split", "val", "--json", "--out", str(tmp_path / "new" / "out"))
    content = json.loads(out)
    assert (code, err) == (0, err)
    assert "8/8 images" in err
    latency = content.pop("latency")
    assert (latency["num_timed"], latency["batch_size"], latency["device"]) == (8, 8, "cpu")
    result = ScoreResult.model_validate_json(json.dumps(content))
    assert (result.run_key, result.split, result.counts["num_detected_images"]) == (run.run_key, "val", 8)
    assert result.options == score_options(run)
    folder = tmp_path / "new" / "out"
    assert json.loads((folder / "score_val.json").read_text()) == content
    assert f"{latency['p50_ms']:,.4g}" in (folder / "report.html").read_text()
    assert json.loads((folder / "analysis_val.json").read_text())["chosen_on"] == "val"
    detections = json.loads((folder / "detections_val.json").read_text())
    truth = json.loads((tiny.folder / "annotations" / "val.json").read_text())
    expected = score(truth, detections, ignore_rule="covered-half").metrics
    assert {name: value for name, value in result.metrics.items() if name.startswith("coco/")} == expected
    assert len(detections) == result.counts["num_detections"] > 50


def test_a_run_s_own_operating_point_is_what_a_split_is_measured_at(
    evaluate: Callable[..., Any], weights: Path, run: RunSpec, tmp_path: Path
) -> None:
    chosen = {"score": 0.0625, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    write_json(weights.with_name("operating_point.json"), {"overall": chosen, "per_class": {}})
    code, out, _ = evaluate(run.run_key, "--no-latency", "--json", "--out", str(tmp_path / "out"))
    assert code == 0
    assert json.loads(out)["metrics"]["analysis/threshold"] == 0.0625
    assert json.loads((tmp_path / "out" / "analysis_test.json").read_text())["chosen_on"] == "val"


@pytest.mark.parametrize(
    ("rules", "is_other_dataset", "told"),
    [
        ((), False, None),
        (("--max-dets", "7"), False, "under the options"),
        ((NAME,), True, "on the dataset"),
        ((NAME, "--flip"), True, "on the dataset and under the options"),
    ],
)
def test_thresholds_that_were_chosen_elsewhere_are_told(
    evaluate: Callable[..., Any], weights: Path, run: RunSpec, tiny: Any, monkeypatch: pytest.MonkeyPatch,
    rules: tuple[str, ...], is_other_dataset: bool, told: str | None,
) -> None:  # fmt: skip
    write_json(weights.with_name("operating_point.json"), {"overall": None, "per_class": {}})
    if is_other_dataset:
        card = tiny.card.model_copy(update={"protocol": "voc"})
        monkeypatch.setattr("flows.find_model.load_card", lambda _: card)
    code, out, _ = evaluate(run.run_key, *rules, "--no-latency")
    notes = [line for line in out.splitlines() if "note:" in line]
    assert code == 0
    assert notes == ([f"  note: the thresholds of analysis/... were chosen on val, {told} of the model's own run"]
                     if told else [])  # fmt: skip


def test_a_run_scored_again_measures_test_at_the_point_that_val_chose(
    run: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only now does the environment say where the dataset is fetched from.
    settings, scores = Settings(), iter([0.75, 0.5])

    def every_object(*_: Any, ground_truth: Any) -> Detected:
        confidence = next(scores)
        found = [
            {name: box[name] for name in ("image_id", "category_id", "bbox")} | {"score": confidence}
            for box in ground_truth["annotations"]
        ]
        return Detected(found, {}, [ObjectScore(box["id"], 1.0, confidence) for box in ground_truth["annotations"]])

    monkeypatch.setattr("flows.evaluate.detect_split", every_object)
    result = score_again(find_result(run.run_key, settings), run, settings)
    points = {split: scored.metrics["analysis/threshold"] for split, scored in result.scores.items()}
    assert points == {"val": 0.75, "test": 0.75}
    # Every object of test has a detection below that score.
    assert (result.scores["test"].metrics["coco/AP"], result.scores["test"].metrics["analysis/recall"]) == (1, 0)
    artifacts = settings.storage / run.run_key / "artifacts"
    assert json.loads((artifacts / "operating_point.json").read_text())["overall"]["score"] == 0.75
    assert json.loads((artifacts / "analysis_test.json").read_text())["chosen_on"] == "val"


def test_the_text_says_by_which_rules(evaluate: Callable[..., Any], run: RunSpec) -> None:
    rules = ("--split", "train", "--flip", "--tile-size", "48", "--input-size", "96", "--max-dets", "7")
    code, out, _ = evaluate(run.run_key, *rules)
    assert code == 0
    printed = out.splitlines()
    # A slow machine says more than once how far it is.
    num_progress = sum("/96 tiles, " in line for line in printed)
    lines = printed[num_progress - 1 :]
    assert lines[0].startswith("96/96 tiles, ")
    assert lines[1] == f"{run.run_key} on {NAME} {run.dataset.version[:12]} train"
    assert lines[2] == (
        "  tiles of 48 px, overlap 9 px, at 96 px, and mirrored; fp32, score >= 0, NMS IoU 0.65, maxDets 7"
    )
    assert "detected_images 24" in lines[3]
    assert lines[-1].startswith("  latency on cpu, threads ")
    assert lines[-1].endswith("with decoding; 4.0 tiles an image")
    assert "latency" not in evaluate(run.run_key, "--no-latency")[1]


def test_a_file_is_the_run_beside_whose_spec_it_lies(
    weights: Path, run: RunSpec, settings: Settings, evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    assert found(str(weights), settings) == FoundModel(run, weights, run.run_key, None, None)
    alone = Path(shutil.copy(weights, tmp_path / "alone.safetensors"))
    model = found(str(alone), settings, dataset=NAME, architecture="yolox-nano")
    assert model.run_key == file_sha256(alone)[:12]
    assert (model.spec.dataset, model.spec.training.input_size_px) == (run.dataset, 320)
    assert "--input-size" in evaluate(str(alone), NAME, "--architecture", "yolox-nano")[2]
    code, _, err = evaluate(str(alone), NAME, "--architecture", "yolox-nano", "--input-size", "64")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("UnfitWeights: ")
    assert "have no counterpart of the same shape" in err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("{alone}", {}, "has no spec.json beside it, so say what it is: --architecture NAME, and the DATASET"),
        ("{alone}", {"architecture": "yolox-nano"}, "has no spec.json"),
        ("{weights}", {"architecture": "yolox-nano"}, "is for a weights file without spec.json beside it"),
        ("{key}", {"architecture": "yolox-nano"}, "is for a weights file without spec.json beside it"),
        ("no/such.safetensors", {}, "must be a .safetensors file that exists"),
        ("{weights}.pth", {}, "must be a .safetensors file that exists"),
        ("{damaged}", {}, "is no spec of a run; put the run's own beside its weights:\n  seeds: unknown key"),
    ],
)
def test_what_is_no_model_is_named(
    weights: Path, run: RunSpec, settings: Settings, tmp_path: Path, name: str, options: dict[str, str], message: str
) -> None:
    alone = shutil.copy(weights, tmp_path / "alone.safetensors")
    damaged = tmp_path / "damaged" / "weights.safetensors"
    damaged.parent.mkdir()
    shutil.copy(weights, damaged)
    (damaged.parent / "spec.json").write_text(json.dumps(run.model_dump(mode="json") | {"seeds": 1}))
    with pytest.raises(UnknownModel) as error:
        found(name.format(alone=alone, weights=weights, key=run.run_key, damaged=damaged), settings, **options)
    assert message in str(error.value)


def test_weights_that_are_damaged_or_of_another_model_are_an_error(weights: Path, run: RunSpec, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnfitWeights, match="is no safetensors file, or is damaged"):
        load_model(run, cut)
    card = run.dataset.card.model_copy(update={"classes": ("one", "two", "three")})
    other = run.model_copy(update={"dataset": run.dataset.model_copy(update={"card": card})})
    with pytest.raises(UnfitWeights, match="has for 3 classes"):
        load_model(other, weights)


def test_a_dataset_needs_the_same_classes_and_a_version(
    run: RunSpec, settings: Settings, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(run.run_key, settings, dataset=NAME).spec == run
    cards = {"swapped": tiny.card.model_copy(update={"name": "swapped", "classes": ("dark", "bright")})}
    monkeypatch.setattr("flows.find_model.load_card", cards.__getitem__)
    with pytest.raises(OtherClasses, match=r"the model finds bright, dark .of tiny-squares., swapped has dark, bright"):
        found(run.run_key, settings, dataset="swapped")
    monkeypatch.setattr("flows.find_model.current_version", lambda *_: None)
    with pytest.raises(UnpreparedDataset, match="dvc repro prepare@swapped"):
        found(run.run_key, settings, dataset="swapped")
    with pytest.raises(UnknownRun):
        found("0123", settings)


def test_a_registered_version_is_a_verified_copy(
    weights: Path, run: RunSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(number: int, *aliases: str) -> Version:
        return Version(number, run.run_key, "r", 0, aliases, {}, {})

    def download(client: Any, name: str, number: int, into: Path) -> Path:
        fetched.append((name, number))
        shutil.copytree(weights.parent, into / "model" / "artifacts")
        return into / "model"

    fetched: list[tuple[str, int]] = []
    registered = {NAME: [version(12, "champion"), version(2, "previous")]}
    monkeypatch.setattr(flows.find_model, "connect", lambda *_: None)
    monkeypatch.setattr(flows.find_model, "decisions", lambda *_: [])
    monkeypatch.setattr(flows.find_model, "history", lambda _, name: registered.get(name, []))
    monkeypatch.setattr(flows.find_model, "download_verified", download)
    for uri in (f"models:/{NAME}@champion", f"models:/{NAME}/2"):
        with find_model(uri, settings) as model:
            assert (model.spec, model.run_key) == (run, run.run_key)
            assert file_sha256(model.weights) == file_sha256(weights)
        assert not model.weights.exists()
    assert fetched == [(NAME, 12), (NAME, 2)]
    for uri, message in {
        f"models:/{NAME}/1": "is not registered. Versions of tiny-squares: 12 @champion, 2 @previous",
        f"models:/{NAME}@best": "is not registered. Versions of tiny-squares: 12 @champion, 2 @previous",
        "models:/other@champion": "'other' has no version; run `speck train-all`",
        f"models:/{NAME}": "must be models:/NAME@alias or models:/NAME/VERSION",
    }.items():
        with pytest.raises(UnknownModel) as error:
            found(uri, settings)
        assert message in str(error.value)


def test_tiles_are_the_usual_ones_unless_told_otherwise(tiny_spec: MakeSpec) -> None:
    spec = tiny_spec()

    def tiling(spec: RunSpec, usual: TileGrid | None, **rules: Any) -> tuple[int, int] | None:
        grid = score_options(with_rules(spec, usual, **rules)).tiling
        return None if grid is None else (grid.size_px, grid.overlap_px)

    assert with_rules(spec, None) == spec
    assert tiling(spec, None, tiled=True) == (64, 12)
    assert tiling(spec, None, tiled=True, input_size_px=160) == (160, 32)
    assert tiling(spec, None, tile_size_px=50) == (50, 10)
    usual = TileGrid(size_px=48, overlap_px=4)
    assert tiling(spec, usual) == tiling(spec, usual, tiled=True) == (48, 4)
    assert tiling(spec, usual, tile_overlap_px=0) == (48, 0)
    assert tiling(spec, usual, tile_size_px=100) == (100, 20)
    assert tiling(spec, usual, tiled=False) is None
    card = spec.dataset.card.model_copy(update={"tiling": Tiling(size_px=40, overlap_px=2)})
    cut = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"card": card})})
    # Another dataset's card: the model was scored on whole pictures, and tiles have to be asked for.
    assert tiling(cut, None) is None
    assert tiling(cut, None, tiled=True) == (40, 2)
    assert tiling(cut, usual) == (48, 4)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"input_size_px": 100}, "input_size_px: Input should be a multiple of 32, got 100"),
        ({"max_dets": 0}, "max_dets: Input should be greater than or equal to 1, got 0"),
        ({"tile_size_px": 0}, "tiling.size_px: Input should be greater than or equal to 32, got 0"),
        ({"tile_size_px": 8}, "tiling.size_px: Input should be greater than or equal to 32, got 8"),
        ({"tile_size_px": 64, "tile_overlap_px": 33}, "overlap_px must be at most half of size_px (64), got 33"),
        ({"tiled": False, "tile_size_px": 64}, "leave out --tile-size and --tile-overlap, or use --tiled"),
    ],
)
def test_impossible_rules_are_named(tiny_spec: MakeSpec, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(BadScoring) as error:
        with_rules(tiny_spec(), None, **rules)
    assert message in str(error.value)


def test_the_pace_is_told_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [100.0], list[str]()
    monkeypatch.setattr("flows.evaluate.time.monotonic", lambda: now[0])
    pace = _Pace(200, False, lines.append)
    for seconds, num_done in [(30, 0), (2, 10), (8, 50), (1, 60), (29, 199), (1, 200)]:
        now[0] += seconds
        pace.tell(num_done)
    assert lines == [
        "50/200 images, 5.0 images/s, ETA 0:30",
        "199/200 images, 5.0 images/s, ETA 0:00",
        "200/200 images, 4.9 images/s, ETA 0:00",
    ]

"""`speck predict`: the detections of evaluation on any pictures, drawn and in COCO's form."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from data.tiling import TileGrid
from flows.cli import main
from flows.predict import BadPictures, find_pictures, predict
from training.checkpoint import write_json
from training.scoring import detect_split, load_model, split_inputs
from training.spec import RunSpec, ScoringSpec
from training.workers import Workers


@pytest.fixture
def weights(run: RunSpec, settings: Any) -> Path:
    folder: Path = settings.storage / run.run_key / "artifacts"
    return folder / "weights.safetensors"


@pytest.fixture
def val(tiny: Any, tmp_path: Path) -> Path:
    """A folder with the pictures of val alone."""
    folder = tmp_path / "val"
    folder.mkdir()
    for path in (tiny.folder / "images").glob("val-*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def speck(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["speck", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else int(code is not None)), printed.out, printed.err

    return call


@pytest.mark.parametrize(
    "rules", [{}, {"tiling": TileGrid(size_px=40, overlap_px=12)}, {"flip": True}], ids=["whole", "tiles", "mirrored"]
)
def test_predictions_are_those_of_evaluation(
    rules: dict[str, Any], run: RunSpec, weights: Path, val: Path, tiny: Any
) -> None:
    spec = run.model_copy(update={"scoring": ScoringSpec(score_threshold=0, max_detections=20, **rules)})
    truth = tiny.folder / "annotations" / "val.json"
    predicted = predict(spec, weights, find_pictures([val], truth))
    workers = Workers(0, 1, torch.device("cpu"))
    evaluated = detect_split(spec, load_model(spec, weights), split_inputs(spec, tiny.folder, "val"), workers)
    assert evaluated is not None
    assert len(predicted.detections) == len(evaluated.detections) == 8 * 20
    for one, other in zip(predicted.detections, evaluated.detections, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert [*one["bbox"], one["score"]] == pytest.approx([*other["bbox"], other["score"]], abs=1e-6)


def test_what_is_written_can_be_scored_and_seen(
    speck: Callable[..., Any], run: RunSpec, weights: Path, val: Path, tiny: Any, tmp_path: Path
) -> None:
    chosen = {"score": 0.0, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    write_json(weights.with_name("operating_point.json"), {"overall": chosen, "per_class": {}})
    (val / "broken.jpg").write_text("no picture")
    (val / "notes.txt").write_text("not meant to be one")
    truth, out = tiny.folder / "annotations" / "val.json", tmp_path / "out"
    code, printed, err = speck("predict", run.run_key[:6], val, "--out", out, "--json")
    told = json.loads(printed)
    assert (code, told["num_images"], told["num_detections"], told["num_shown"]) == (0, 8, 160, 160)
    assert "1 of 10 files" in err
    assert list(told["unreadable"]) == ["broken.jpg"]

    images = json.loads((out / "images.json").read_text())
    ids = {image["id"]: image["file_name"] for image in images["images"]}
    true_ids = {image["file_name"]: image["id"] for image in json.loads(truth.read_text())["images"]}
    detections = json.loads((out / "detections.json").read_text())
    renamed = [row | {"image_id": true_ids[ids[row["image_id"]]]} for row in detections]
    (out / "renamed.json").write_text(json.dumps(renamed))
    everything = tiny.folder / "images"
    assert speck("predict", run.run_key, everything, "--out", tmp_path / "other", "--image-ids", truth)[0] == 0
    assert json.loads((tmp_path / "other" / "detections.json").read_text()) == renamed
    scored = speck(
        "score", "--protocol", "coco", "--ground-truth", truth, "--detections", out / "renamed.json", "--json"
    )
    evaluated = speck("evaluate", run.run_key, "--split", "val", "--no-latency", "--json")
    ap = [json.loads(text)["metrics"]["coco/AR_100"] for _, text, _ in (scored, evaluated)]
    assert ap[0] == pytest.approx(ap[1], abs=1e-9)
    assert ap[0] > 0

    for name in ids.values():
        drawn, original = cv2.imread(str(out / "pictures" / name)), cv2.imread(str(val / name))
        assert drawn.shape == original.shape
        assert (drawn != original).any()


def test_only_boxes_from_the_score_on_are_drawn(
    speck: Callable[..., Any], run: RunSpec, val: Path, tmp_path: Path
) -> None:
    code, out, _ = speck("predict", run.run_key, val / "val-000.png", "--score", "1", "--out", tmp_path / "out")
    assert (code, "0 objects with a score of at least 1.000 on 1 pictures" in out) == (0, True)
    drawn = cv2.imread(str(tmp_path / "out" / "pictures" / "val-000.png"))
    np.testing.assert_array_equal(drawn, cv2.imread(str(val / "val-000.png")))
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 20


def test_pictures_none_of_which_can_be_read_are_an_error(
    speck: Callable[..., Any], run: RunSpec, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_text("no picture")
    code, _, err = speck("predict", run.run_key, tmp_path / "a.png", "--out", tmp_path / "out")
    assert (code, "none of 1 pictures can be read; a.png" in err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_pictures_are_called_by_their_place_in_the_folder(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/deep/x.JPG", "b/x.png", "a/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures([tmp_path / "a"], None)
    assert [(picture.image_id, picture.file_name) for picture in found] == [(1, "deep/x.JPG"), (2, "x.png")]
    with pytest.raises(BadPictures, match=r"would both be 'x.png'"):
        find_pictures([tmp_path / "a", tmp_path / "b"], None)
    (tmp_path / "x").touch()
    with pytest.raises(BadPictures, match=r"would both be 'x.png'"):
        find_pictures([tmp_path / "x", tmp_path / "b" / "x.png"], None)
    with pytest.raises(BadPictures, match="does not exist"):
        find_pictures([tmp_path / "c"], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadPictures, match="no picture in"):
        find_pictures([tmp_path / "empty"], None)
    (tmp_path / "ids.json").write_text('{"images": [{"id": 7, "file_name": "x.png"}, {"id": 8, "file_name": "y"}]}')
    told: list[str] = []
    assert find_pictures([tmp_path / "a"], tmp_path / "ids.json", told.append) == [(7, "x.png", tmp_path / "a/x.png")]
    assert [line.partition(" pictures")[0] for line in told] == ["1 of 2", "1 of 2"]
    assert ["left out" in told[0], "missing" in told[1]] == [True, True]
    with pytest.raises(BadPictures, match="no picture of 1 has a name that is in"):
        find_pictures([tmp_path / "a" / "deep" / "x.JPG"], tmp_path / "ids.json")
    (tmp_path / "ids.json").write_text("[]")
    with pytest.raises(BadPictures, match="must be a COCO file"):
        find_pictures([tmp_path / "a"], tmp_path / "ids.json")

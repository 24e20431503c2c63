"""`speck score`: official numbers of files, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app, is_expected

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
STATS = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]


def speck_score(protocol: str, truth: Path, found: Path, *options: object) -> Result:
    arguments = ["score", "--protocol", protocol, "--ground-truth", truth, "--detections", found, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def numbers(*arguments: Any) -> Any:
    answer = speck_score(*arguments, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def fixture(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent: the evaluation fixtures are not part of the project")
    return SHARED / name


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """VisDrone's, of one picture: two cars found out of order, one ignore region, one `others`."""
    for name, text in (
        ("annotations/a.txt", "10,10,8,8,1,4,0,0\n30,30,20,20,0,0,0,0\n60,10,8,8,1,4,0,0\n50,70,6,6,1,11,0,0\n"),
        ("detections/a.txt", "10,10,8,8,0.5,4,-1,-1\n60,10,8,8,0.75,4,-1,-1\n32,32,9,9,0.25,4,-1,-1\n"),
        ("sizes.json", '{"a": [100, 90]}'),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_published_numbers_of_the_coco_api() -> None:
    folder = fixture("coco_eval")
    truth = folder / "dataset/cocoapi/instances_val2014_100.json"
    found = folder / "cocoapi_results/instances_val2014_fakebbox100_results.json"
    published = (folder / "cocoapi_results/val2014_fake_eval_res.txt").read_text().split("type=bbox")[1]
    lines = [line for line in published.split("type=keypoints")[0].splitlines() if " = 0" in line]
    metrics = numbers("coco", truth, found)["metrics"]
    assert [f"{metrics[f'coco/{name}']:.3f}" for name in STATS] == [line.rpartition(" = ")[2] for line in lines]
    printed = speck_score("coco", truth, found).stdout
    assert f"  coco/AP                      {metrics['coco/AP']:.4f}" in printed


def test_the_official_numbers_of_visdrone_and_uavdt() -> None:
    folder = fixture("visdrone_small")
    expected = json.loads((folder / "expected.json").read_text())["visdrone"]["summary"]
    told = numbers("visdrone", folder, folder / "detections", "--image-sizes", folder / "image_sizes.json")
    for name, value in expected.items():
        assert 100 * told["metrics"][f"visdrone/{name.replace('AR', 'AR_')}"] == pytest.approx(value, abs=1e-9, rel=0)
    folder = fixture("uavdt_small")
    expected = json.loads((folder / "expected.json").read_text())["overall"]["AP"]
    told = numbers("uavdt", folder / "GT", folder / "detections")
    assert 100 * told["metrics"]["uavdt/AP70"] == pytest.approx(expected, abs=1e-9, rel=0)
    assert told["counts"]["num_images"] == 150


def test_all_protocols_from_the_same_detections_and_what_is_printed(files: Path) -> None:
    printed = {
        protocol: speck_score(protocol, files, files / "detections", "--image-sizes", files / "sizes.json").stdout
        for protocol in ("coco", "visdrone", "uavdt", "aitod", "voc")
    }
    for protocol, text in printed.items():
        lines = text.splitlines()
        assert lines[0] == f"protocol {protocol}"
        assert [line for line in lines if line in {"rules", "counts", "metrics"}] == ["rules", "counts", "metrics"]
        assert next(line for line in lines if line.startswith("  car ")).split()[-1] == "2"
    assert "  ignore_rule                  none" in printed["coco"]
    assert "  max_dets                     100 per image and class, best first" in printed["coco"]
    assert "  num_others_ground_truths     1" in printed["coco"]
    assert "num_others" not in printed["visdrone"]
    assert "  visdrone/AP                  1.0000" in printed["visdrone"]
    assert "  num_ignored_detections       1" in printed["visdrone"]
    assert "note: the detections of 1 images are not sorted by score, descending" in printed["visdrone"]
    for protocol, text in printed.items():
        notes = [line for line in text.splitlines() if line.startswith("note:") and "ignore regions" in line]
        told = ["note: 1 images have ignore regions, not used: --ignore-rule covered-half"]
        assert notes == (told if protocol in {"coco", "aitod", "voc"} else [])
    assert "  bus                   -" in printed["visdrone"]


def test_options_reach_the_protocol(files: Path) -> None:
    plain = numbers("coco", files, files / "detections")
    ignoring = numbers("coco", files, files / "detections", "--ignore-rule", "covered-half", "--max-dets", "1")
    assert plain["counts"]["num_ignored_detections"] == 0
    assert ignoring["counts"]["num_ignored_detections"] == 1
    assert len(plain["notes"]) == 1
    assert ignoring["notes"] == []
    assert ignoring["rules"]["ignore_rule"] == "covered-half"
    assert ignoring["rules"]["max_dets"] == "1 per image and class, best first"
    assert ignoring["metrics"]["coco/AR_1"] == 0.5
    limited = numbers("visdrone", files, files / "detections", "--image-sizes", files / "sizes.json", "--max-dets", "1")
    assert limited["metrics"]["visdrone/AR_1"] == 0.5
    assert limited["counts"]["num_truncated_detections"] == 1
    assert limited["rules"]["max_dets"] == "1 per image over all classes, in the order of the file"


@pytest.mark.parametrize(
    ("protocol", "options", "expected"),
    [
        ("voc", ["--max-dets", "5"], "protocol voc leaves no choice"),
        ("aitod", ["--max-dets", "5"], "1500 per image and class"),
        ("visdrone", ["--ignore-rule", "none"], "protocol visdrone has its own"),
        ("coco", ["--max-dets", "0"], "--max-dets"),
        ("kitti", [], "'kitti' is not one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    files: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, options: list[str], expected: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = speck_score(protocol, files, files / "detections", *options)
    assert answer.exit_code == 2
    assert expected in answer.output


def test_empty_files_are_read_and_told(files: Path) -> None:
    for name in ("annotations/b.txt", "detections/b.txt", "detections/c.txt"):
        (files / name).write_text("")
    (files / "annotations/c.txt").write_text("10,10,8,8,1,4,0,0\n")
    told = numbers("voc", files, files / "detections", "--ignore-rule", "covered-half")
    says = "an empty file says that there is nothing"
    assert told["notes"] == [
        f"1 of 3 files of ground truth are empty, the first is {files}/annotations/b.txt: {says}",
        f"2 of 3 files of detections are empty, the first is {files}/detections/b.txt: {says}",
    ]
    for name, text in (("GT/M0101_gt_whole.txt", "1,1,1,1,9,9,1,1,1\n"), ("GT/M0102_gt_whole.txt", "")):
        (files / "u" / name).parent.mkdir(parents=True, exist_ok=True)
        (files / "u" / name).write_text(text)
        (files / "u" / f"{name[3:8]}.txt").write_text(text.replace("9,9,1,1,1", "9,9,0.5,1,1"))
    told = numbers("uavdt", files / "u", files / "u")
    assert told["notes"] == [
        f"1 of 2 files of ground truth are empty, the first is {files}/u/GT/M0102_gt_whole.txt: {says}",
        f"1 of 2 files of detections are empty, the first is {files}/u/M0102.txt: {says}",
    ]


def test_bad_files_are_an_answer_and_no_fault(files: Path) -> None:
    (files / "detections/a.txt").write_text("1,2,3\n")
    for protocol, truth in (("coco", files), ("coco", files / "absent")):
        answer = speck_score(protocol, truth, files / "detections")
        assert isinstance(answer.exception, ValueError)
        assert is_expected(answer.exception)
        assert "1 problem(s):" in str(answer.exception)
    (files / "detections/a.txt").write_text("")
    answer = speck_score("visdrone", files, files / "detections")
    assert answer.exception is not None
    assert is_expected(answer.exception)
    assert "'a.jpg'; the protocol needs it: add it (speck score: --image-sizes, by names" in str(answer.exception)

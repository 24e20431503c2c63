from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from flows.data_commands import data_app


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset `tiny`, linked: a grey picture a split, with transparency, and a label that sticks out."""
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    (source / "annotations").mkdir(parents=True)
    (source / "images").mkdir()
    for split in ("train", "val", "test"):
        cv2.imwrite(str(source / f"images/{split}.png"), rng.integers(0, 256, (8, 8, 4), np.uint8))
        document = {
            "images": [{"id": 1, "file_name": f"{split}.png", "width": 8, "height": 8}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 6, 2]}],
            "categories": [{"id": 1, "name": "car"}],
        }
        (source / f"annotations/{split}.json").write_text(json.dumps(document))
    root = tmp_path / "repo"
    (root / "data/catalog").mkdir(parents=True)
    (root / "data/raw").mkdir()
    (root / "data/raw/tiny").symlink_to(source)
    card = {"name": "tiny", "description": "d", "licence": "l", "format": "coco", "source": "s", "classes": ["car"]}
    (root / "data/catalog/tiny.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setattr("flows.settings.REPO", root)
    return root


def run(*arguments: str) -> Result:
    return CliRunner().invoke(data_app, ["check", "tiny", *arguments])


def test_warnings_are_told_and_end_well(repo: Path) -> None:
    result = run()
    assert result.exit_code == 0
    *lines, last = result.output.splitlines()
    assert last == "tiny: 0 errors, 6 warnings"
    assert len(lines) == 6
    assert lines[0].startswith(f"{repo / 'data/raw/tiny/annotations/train.json'}: warning: annotation 1: box [4, 4, 6")


def test_errors_are_exit_code_1_as_text_and_as_json(repo: Path) -> None:
    (repo / "data/raw/tiny/annotations/val.json").write_text('{"images": [],\n "annotations": }')
    result = run()
    assert result.exit_code == 1
    assert "val.json:2:17: error: not JSON: Expecting value. Write it again" in result.output
    result = run("--json")
    assert result.exit_code == 1
    (error,) = [problem for problem in json.loads(result.output)["problems"] if problem["severity"] == "error"]
    assert (error["line"], error["column"], Path(error["path"]).name) == (2, 17, "val.json")
    assert set(error) == {"path", "line", "column", "rule", "remedy", "severity"}


def test_fixing_counts_by_kind_and_lists_the_rest(repo: Path) -> None:
    (repo / "data/raw/tiny/images/val.png").write_bytes(b"")
    result = run("--fix")
    assert result.exit_code == 1
    error, *lines = result.output.splitlines()
    assert "the file is empty (0 bytes). Replace the file" in error
    assert lines == ["tiny: fixed in a copy: alpha 2, clipped boxes 3", "tiny: 1 errors, 0 warnings"]
    result = run("--fix", "--json")
    assert json.loads(result.output)["fixed"] == {}
    assert len(json.loads(result.output)["problems"]) == 1
    assert "tiny: there was nothing to fix" in run("--fix").output

"""How a dataset's report reaches people: the command, Prefect, MLflow; and that training never waits for it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import flows.data_report
from data.versioning import DatasetVersion
from flows.cli import main
from flows.settings import Settings
from tracking.client import TrackingUnavailable

VERSION = DatasetVersion("tiny-squares", "a" * 32, 44, 1000, {}, regenerated=False)


@pytest.fixture
def repo(tiny: Any, tmp_path: Path) -> Path:
    """A repository with the prepared dataset in its place."""
    prepared = tmp_path / "repo" / "data" / "processed" / tiny.card.name
    shutil.copytree(tiny.folder, prepared)
    for path in (prepared / "annotations").iterdir():
        info = {"info": {"num_boxes_clipped": 0, "num_boxes_excluded": 0}}
        path.write_text(json.dumps(json.loads(path.read_text()) | info))
    catalog = tmp_path / "repo" / "data" / "catalog"
    catalog.mkdir()
    (catalog / f"{tiny.card.name}.yaml").write_text(yaml.safe_dump(tiny.card.model_dump(mode="json")))
    return tmp_path / "repo"


class Surroundings:
    """Prefect and MLflow as the task sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
        self.artifacts: list[dict[str, Any]] = []
        self.uploads: list[tuple[Any, ...]] = []
        self.said: list[str] = []
        self.warnings: list[str] = []
        monkeypatch.setattr(flows.data_report, "REPO", repo)
        monkeypatch.setattr(
            flows.data_report, "create_markdown_artifact", lambda **values: self.artifacts.append(values)
        )
        monkeypatch.setattr(flows.data_report, "connect", lambda _: "client")
        monkeypatch.setattr(flows.data_report, "upload", self.upload)
        monkeypatch.setattr(flows.data_report, "say", self.said.append)
        monkeypatch.setattr(flows.data_report, "warn", self.warnings.append)

    def upload(self, client: Any, run_id: str, folder: Path, under: str) -> None:
        self.uploads.append((client, run_id, sorted(path.name for path in folder.iterdir()), under))

    def report(self, parent_run_id: str | None = "parent") -> None:
        flows.data_report.report_data.fn(VERSION, Settings(), parent_run_id)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch, repo: Path, settings: Settings) -> Surroundings:
    return Surroundings(monkeypatch, repo)


def test_the_report_goes_to_prefect_and_to_the_parent_run(around: Surroundings) -> None:
    around.report()
    (artifact,) = around.artifacts
    assert artifact["key"] == "data-tiny-squares"
    assert "train: 24 images" in artifact["markdown"]
    assert around.uploads == [
        ("client", "parent", ["images.json", "report.html", "report.json"], "data/tiny-squares"),
    ]
    assert around.said[0].endswith("report.html")
    assert around.warnings == []


def test_without_a_parent_run_nothing_is_sent(around: Surroundings) -> None:
    around.report(None)
    assert (len(around.artifacts), around.uploads, around.warnings) == (1, [], [])


def test_what_goes_wrong_is_said_and_not_raised(
    around: Surroundings, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(uri: str) -> None:
        raise TrackingUnavailable("the store is gone")

    monkeypatch.setattr(flows.data_report, "connect", gone)
    around.report()
    assert "missing or incomplete: the store is gone" in around.warnings[0]
    shutil.rmtree(repo / "data" / "processed")
    around.report()
    assert "is not prepared" in around.warnings[1]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(
    repo: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    monkeypatch.setattr("flows.settings.REPO", repo)
    monkeypatch.setattr("data.versioning.version_dataset", lambda *_: VERSION)
    monkeypatch.setattr(sys, "argv", ["speck", "data", "report", "tiny-squares", *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    if as_json:
        assert json.loads(printed)["splits"]["train"]["num_images"] == 24
    else:
        page = Path(printed.splitlines()[-1])
        assert page.read_text().startswith("<!doctype html>")
        assert "val: 8 images" in printed

"""`prefect.yaml` as a user takes it up, in a copy of the checkout: server, `deploy --all`, worker, `deployment run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos.processes import MARK, left_after, marked, new_mark, wait_until
from services.prefect_server import PrefectService, prefect_service, process_worker

from data.report import HTML, JSON, LOCK, report_folder
from data.versioning import current_version
from tracking.client import connect
from tracking.registry import champion
from training.records import RunResult, read_result

ROOT = Path(__file__).parents[2]
RECIPE = {"image_size_px": 128, "num_images": {"train": 16, "val": 4, "test": 4}}
SMALL = ["training.epochs=1", "training.closing_epochs=0", "training.input_size_px=96"]
CELL = {"architectures": ["yolox-nano"], "datasets": ["sample-aerial"]}
RUN_S = 180.0
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Deployed:
    """A copy of the checkout whose deployments are on a server with a worker."""

    repo: Path
    home: Path
    service: PrefectService
    mark: str

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs Prefect's own command line in the copy."""
        return subprocess.run(
            [sys.executable, "-m", "prefect", *arguments], cwd=self.repo, env=os.environ | self.service.environment,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def start(self, **parameters: Any) -> str:
        """`prefect deployment run train-all/default`; returns the flow run's id."""
        name = uuid.uuid4().hex
        given = [part for key, value in parameters.items() for part in ("--param", f"{key}={json.dumps(value)}")]
        started = self.prefect("deployment", "run", "train-all/default", "--flow-run-name", name, *given)
        assert started.returncode == 0, started.stdout + started.stderr
        (run,) = self.service.request("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return str(run["id"])

    def state(self, run_id: str) -> dict[str, Any]:
        """Type and message of the flow run's state."""
        return dict(self.service.request(f"/flow_runs/{run_id}")["state"])

    def end(self, run_id: str) -> dict[str, Any]:
        """Waits for the flow run's final state."""
        wait_until(lambda: self.state(run_id)["type"] in FINAL, RUN_S, f"the end of flow run {run_id}", every_s=0.5)
        return self.state(run_id)

    def artifact(self, run_id: str, key: str) -> list[str]:
        """The lines of the Markdown that the flow run left behind under `key`."""
        wanted = {"key": {"any_": [key]}, "flow_run_id": {"any_": [run_id]}}
        (found,) = self.service.request("/artifacts/filter", {"artifacts": wanted})
        return [str(line) for line in found["data"].splitlines()]

    def table(self, run_id: str, key: str) -> list[list[str]]:
        """The cells of the table in it."""
        lines = self.artifact(run_id, key)
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


def copy_checkout(repo: Path) -> None:
    """All that git tracks or would track, as a repository of its own with a sample of 24 small pictures."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, repo / name)
    recipe = repo / "data/raw/sample-aerial/recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | RECIPE))
    subprocess.run(["git", "init", "--quiet", str(repo)], check=True)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder, mark = tmp_path_factory.mktemp("deployment"), new_mark()
    repo, home = folder / "repo", folder / "home"
    copy_checkout(repo)
    with pytest.MonkeyPatch.context() as environment:
        for name in os.environ:
            if name.startswith(("SPECK_", "MLFLOW_", "PREFECT_", "RAY_")):
                environment.delenv(name)
        environment.setenv(MARK, mark)
        environment.setenv("SPECK_HOME", str(home))
        environment.setenv("SPECK_STORE", str(folder / "store"))
        # Stands for the copy's own `.venv`: the packages of this one come from the original checkout.
        environment.setenv("PYTHONPATH", str(repo))
        with prefect_service(folder) as service:
            made = Deployed(repo, home, service, mark)
            for step in (("work-pool", "create", "speck", "--type", "process"), ("--no-prompt", "deploy", "--all")):
                done = made.prefect(*step)
                assert done.returncode == 0, done.stdout + done.stderr
            # Not in the copy: the deployment knows where its code is.
            with process_worker(service, "speck", cwd=folder):
                yield made
    assert left_after(mark, 30) == [], "processes that outlived server and worker"


@dataclass(frozen=True)
class Finished:
    """A run that trained one cell, and one that was started meanwhile."""

    run_id: str
    state: dict[str, Any]
    meanwhile: dict[str, Any]
    result: RunResult


@pytest.fixture(scope="module")
def finished(deployed: Deployed) -> Finished:
    run_id = deployed.start(changes=SMALL, **CELL)
    wait_until(lambda: deployed.state(run_id)["type"] == "RUNNING", 60, "a running flow", every_s=0.5)
    meanwhile = deployed.end(deployed.start())
    state = deployed.end(run_id)
    assert state["type"] == "COMPLETED", state["message"]
    (path,) = (deployed.home / "runs").glob("*/result.json")
    result = read_result(path.parent)
    assert result is not None
    return Finished(run_id, state, meanwhile, result)


def test_a_run_leaves_a_result_of_the_copys_own_data(deployed: Deployed, finished: Finished) -> None:
    version = current_version("sample-aerial", deployed.repo)
    assert version is not None
    assert version.version != current_version("sample-aerial", ROOT).version  # type: ignore[union-attr]
    spec = finished.result.spec
    assert (spec.dataset.version, spec.architecture.name) == (version.version, "yolox-nano")
    assert (spec.training.epochs, spec.training.input_size_px) == (1, 96)


def test_the_run_is_in_mlflow_and_holds_the_alias(deployed: Deployed, finished: Finished) -> None:
    client = connect(f"sqlite:///{deployed.home / 'mlflow.db'}")
    holder = champion(client, "sample-aerial")
    assert holder is not None
    assert holder.run_key == finished.result.run_key
    run = client.get_run(holder.run_id)
    assert (run.info.status, run.data.tags["speck.run_key"]) == ("FINISHED", finished.result.run_key)
    score = finished.result.scores["test"].metrics["coco/AP"]
    assert run.data.metrics["final/test/coco/AP"] == holder.scores["test/coco/AP"] == score
    escaped = finished.result.scores["test"].metrics["analysis/escape_rate"]
    assert run.data.metrics["final/test/analysis/escape_rate"] == escaped
    report = Path(client.download_artifacts(holder.run_id, "report.html")).read_text()
    assert f"run {finished.result.run_key}" in report
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags[f"speck.cell.{finished.result.run_key}"] == holder.run_id


def test_the_report_of_the_data_lies_in_mlflow_and_prefect(deployed: Deployed, finished: Finished) -> None:
    client = connect(f"sqlite:///{deployed.home / 'mlflow.db'}")
    dataset = finished.result.spec.dataset
    holder = champion(client, dataset.name)
    assert holder is not None
    parent = client.get_run(holder.run_id).data.tags["mlflow.parentRunId"]
    folder = report_folder(dataset.name, dataset.version, deployed.repo)
    for name in (HTML, JSON, LOCK):
        kept = Path(client.download_artifacts(parent, f"data/{dataset.name}/{name}"))
        assert kept.read_bytes() == (folder / name).read_bytes()
    report = json.loads((folder / JSON).read_bytes())
    assert report["version"] == dataset.version
    assert report["splits"]["train"]["num_images"] > 0
    shown = deployed.artifact(finished.run_id, f"data-{dataset.name}")
    assert f"- version {dataset.version}" in shown


def test_prefect_shows_plan_and_leaderboard(deployed: Deployed, finished: Finished) -> None:
    plan = deployed.table(finished.run_id, "plan")
    assert [line[:2] for line in plan[2:]] == [["yolox-nano / sample-aerial / seed 0", "train"]]
    header, _, row = deployed.table(finished.run_id, "leaderboard")
    shown = dict(zip(header, row, strict=True))
    scores = finished.result.scores
    expected = {"val AP": scores["val"].metrics["coco/AP"], "test AP": scores["test"].metrics["coco/AP"]}
    assert {name: shown[name] for name in expected} == {name: f"{score:.3f}" for name, score in expected.items()}
    assert (shown["dataset"], shown["architecture"]) == ("sample-aerial", "yolox-nano")
    assert (shown["state"], shown[""]) == (f"trained {finished.result.run_key}", "champion")


def test_the_log_tells_everything_once(deployed: Deployed, finished: Finished) -> None:
    wanted = {"logs": {"flow_run_id": {"any_": [finished.run_id]}}, "limit": 200}
    lines = [line["message"] for line in deployed.service.request("/logs/filter", wanted)]
    told = [line for line in lines if line.startswith("yolox-nano / sample-aerial / seed 0: ")]
    assert len([line for line in told if ": epoch 1/1 done: loss " in line]) == 1
    assert len(set(told)) == len(told)


def test_a_run_started_meanwhile_is_cancelled(finished: Finished) -> None:
    assert finished.meanwhile["type"] == "CANCELLED"
    assert finished.meanwhile["message"] == "Deployment concurrency limit reached."


def test_the_same_run_again_trains_nothing(deployed: Deployed, finished: Finished) -> None:
    run_id = deployed.start(changes=SMALL, **CELL)
    assert deployed.end(run_id)["type"] == "COMPLETED"
    assert [line[1] for line in deployed.table(run_id, "plan")[2:]] == ["cached"]
    assert read_result(deployed.home / "runs" / finished.result.run_key) == finished.result


def test_cancelling_in_prefect_stops_the_cell_and_leaves_it_resumable(deployed: Deployed, finished: Finished) -> None:
    changes = [*SMALL, "training.epochs=500"]
    run_id = deployed.start(changes=changes, **CELL)
    folders = deployed.home / "runs"

    def epochs() -> list[Path]:
        return [path for path in folders.glob("*/journal/*.json") if finished.result.run_key not in path.parts]

    wait_until(lambda: len(epochs()) >= 2, RUN_S, "two epochs", every_s=0.5)
    cancel = {"state": {"type": "CANCELLING", "message": "asked by the test"}, "force": False}
    deployed.service.request(f"/flow_runs/{run_id}/set_state", cancel)
    assert deployed.end(run_id)["type"] == "CANCELLED"
    wait_until(lambda: not marked(deployed.mark, "ray::"), 60, "the end of the workers", every_s=0.5)
    (run_folder,) = {path.parent.parent for path in epochs()}
    client = connect(f"sqlite:///{deployed.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sample-aerial").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`speck.run_key` = '{run_folder.name}'")
    assert run.info.status == "KILLED"
    assert list((deployed.home / "leases").glob("*.json")) == []

    environment = os.environ | deployed.service.environment
    sets = [part for change in changes for part in ("--set", change)]
    axes = ["--architectures", "yolox-nano", "--datasets", "sample-aerial"]
    plan = subprocess.run(
        [sys.executable, "-m", "flows", "plan", "--json", *axes, *sets],
        cwd=deployed.repo, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    (cell,) = json.loads(plan.stdout)["cells"]
    assert (cell["run_key"], cell["state"]) == (run_folder.name, "resume")


def test_a_misspelt_architecture_fails_the_run_with_the_nearest_name(deployed: Deployed) -> None:
    state = deployed.end(deployed.start(architectures=["yolox-nan"]))
    assert state["type"] == "FAILED"
    assert "UnknownArchitecture: 'yolox-nan' is not known. Did you mean 'yolox-nano'?" in state["message"]


@pytest.mark.parametrize(
    ("parameter", "message"), [('seeds=["first"]', "is not of type 'integer'"), ("epochs=3", "not found")]
)
def test_parameters_the_flow_does_not_take_are_refused_before_anything_runs(
    deployed: Deployed, parameter: str, message: str
) -> None:
    def count() -> int:
        return int(deployed.service.request("/flow_runs/count", {}))

    before = count()
    refused = deployed.prefect("deployment", "run", "train-all/default", "--param", parameter)
    assert refused.returncode != 0
    assert message in refused.stdout + refused.stderr
    assert count() == before

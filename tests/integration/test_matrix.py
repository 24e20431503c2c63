"""`speck train-all` over a matrix of cells, on a Ray cluster that outlives it: faults, stops, room, code changes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos.faults import Faults
from chaos.pipeline import EXPERIMENT, RECIPE, FlowRun, Pipeline, make_pipeline
from chaos.processes import left_after, wait_until
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient
from services.ray_cluster import lasting_cluster

ENDS_S = 40.0


@dataclass
class Matrix:
    """A pipeline whose flows submit to the cluster of this file."""

    pipeline: Pipeline
    environment: dict[str, str]
    jobs_url: str
    run_s: float = 400.0

    def write(self, **changes: Any) -> None:
        """Write the experiment."""
        content = EXPERIMENT | {"compute": {"workers": 1, "max_failures": 0}} | changes
        (self.pipeline.repo / "experiment.yaml").write_text(yaml.safe_dump(content))

    def start(self, *arguments: str) -> FlowRun:
        """`speck train-all`."""
        return self.pipeline.start("train-all", *arguments, environment=self.environment)

    def finish(self, *arguments: str, code: int = 0) -> tuple[dict[tuple[str, str, int], dict[str, Any]], str]:
        """Run to the end; the leaderboard's rows by architecture, dataset and seed, and what was printed beside."""
        run = self.start("--json", *arguments)
        assert run.wait(self.run_s) == code, run.output
        wait_until(lambda: not run.reading, 10, "the end of the output")
        assert left_after(run.mark, ENDS_S) == [], "processes that outlived the flow"
        begin = run.lines.index("{")
        end = run.lines.index("}", begin)
        report = json.loads("\n".join(run.lines[begin : end + 1]))
        rows = {(row["architecture"], row["dataset"], row["seed"]): row for row in report["rows"]}
        return rows, "\n".join(run.lines[:begin] + run.lines[end + 1 :])

    def jobs(self) -> dict[str, str]:
        """States of all jobs of this pipeline by their names."""
        keys = {path.name for path in (self.pipeline.home / "runs").iterdir()}
        listed = JobSubmissionClient(self.jobs_url).list_jobs()
        return {job.submission_id: job.status.value for job in listed if job.metadata.get("run_key") in keys}

    def plan(self, *options: str) -> list[dict[str, Any]]:
        """What `speck plan` says of every cell."""
        run = self.pipeline.start("plan", "--json", *options, environment=self.environment)
        assert run.wait(180) == 0, run.output
        wait_until(lambda: not run.reading, 10, "the end of the output")
        return list(json.loads(run.output)["cells"])

    @property
    def mlflow(self) -> MlflowClient:
        """A client of the pipeline's store."""
        return MlflowClient(f"sqlite:///{self.pipeline.home / 'mlflow.db'}")

    def mlflow_runs(self, tag: str = "speck.run_key") -> dict[str, Any]:
        """MLflow's runs that have a tag, by default those of cells, by run name."""
        experiments = [experiment.experiment_id for experiment in self.mlflow.search_experiments()]
        return {run.info.run_name: run for run in self.mlflow.search_runs(experiments, f"tags.`{tag}` != ''")}

    def parents(self) -> list[str]:
        """States of the runs that stand for a `train-all`, sorted."""
        return sorted(run.info.status for run in self.mlflow_runs("speck.train_all").values())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of flows that use a cluster with room for two cells of one worker."""
    with lasting_cluster(tmp_path_factory.mktemp("cluster")) as environment:
        yield environment


@pytest.fixture
def matrix(tmp_path: Path, cluster: dict[str, str]) -> Matrix:
    return Matrix(make_pipeline(tmp_path), cluster, cluster["SPECK_RAY_JOBS_URL"])


def check_faults(
    matrix: Matrix, datasets: list[str], seeds: list[int], broken: dict[tuple[str, str, int], str]
) -> None:
    """Run a matrix with broken cells, then again without faults: the first run finishes all others, the second trains
    exactly the broken ones."""
    faults = Faults(matrix.pipeline)
    architectures = ["yolox-nano", "yolox-n-p2"]
    settings = {name: {"width": 0.125} for name in architectures}
    matrix.write(architectures=architectures, datasets=datasets, seeds=seeds, settings=settings)
    for cell, fault in broken.items():
        faults.inject(*cell, fault)  # type: ignore[arg-type]
    rows, printed = matrix.finish(code=1)
    assert rows.keys() == {(a, d, s) for a in architectures for d in datasets for s in seeds}
    assert {cell for cell, row in rows.items() if row["error"] is not None} == broken.keys()
    causes = {"raise": "poisoned by the test", "diverge": "not finite", "kill": "died|SIGKILL|killed"}
    for cell, fault in broken.items():
        assert any(cause in rows[cell]["error"] for cause in causes[fault].split("|")), rows[cell]["error"]
    assert f"{len(broken)} of {len(rows)} cells failed" in printed
    assert {run.info.status for run in matrix.mlflow_runs().values()} == {"FINISHED", "FAILED"}

    faults.clear()
    again, _ = matrix.finish()
    assert {cell for cell, row in again.items() if row["state"] in {"trained", "resumed"}} == broken.keys()
    assert {row["state"] for cell, row in again.items() if cell not in broken} == {"cached"}
    assert all(again[cell]["test_ap"] == row["test_ap"] for cell, row in rows.items() if cell not in broken)
    assert {run.info.status for run in matrix.mlflow_runs().values()} == {"FINISHED"}
    assert len(matrix.mlflow_runs()) == len(rows)
    assert matrix.parents() == ["FAILED", "FINISHED"]
    (whole,) = (run for run in matrix.mlflow_runs("speck.train_all").values() if run.info.status == "FINISHED")
    for name in datasets:
        page = matrix.mlflow.download_artifacts(whole.info.run_id, f"comparison/{name}/comparison.html")
        assert "Where they differ" in Path(page).read_text()


def test_a_broken_cell_fails_alone_and_the_next_run_trains_exactly_that(matrix: Matrix) -> None:
    check_faults(matrix, ["sample-aerial"], [0], {("yolox-nano", "sample-aerial", 0): "kill"})


@pytest.mark.soak
@pytest.mark.timeout(6000)
def test_a_matrix_of_sixty_with_three_broken_cells(matrix: Matrix) -> None:
    matrix.run_s = 3000.0
    surface = matrix.pipeline.repo / "data" / "raw" / "sample-surface" / "recipe.yaml"
    surface.write_text(yaml.safe_dump(yaml.safe_load(surface.read_text()) | RECIPE))
    (matrix.pipeline.repo / "params.yaml").write_text("datasets:\n  - sample-aerial\n  - sample-surface\n")
    check_faults(
        matrix,
        ["sample-aerial", "sample-surface"],
        [*range(15)],
        {
            ("yolox-nano", "sample-aerial", 0): "raise",
            ("yolox-n-p2", "sample-surface", 1): "diverge",
            ("yolox-nano", "sample-surface", 2): "kill",
        },
    )


@pytest.mark.soak
def test_ctrl_c_stops_all_jobs_and_the_next_run_goes_on(matrix: Matrix) -> None:
    slow = EXPERIMENT["training"] | {"epochs": 400}
    matrix.write(seeds=[0, 1], training=slow)
    run = matrix.start()
    try:
        wait_until(lambda: len({entry.run_key for entry in matrix.pipeline.reports()}) == 2, 150, "two cells at once")
        assert set(matrix.jobs().values()) == {"RUNNING"}
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(180) == 130, run.output
    finally:
        run.process.kill()
        left = left_after(run.mark, ENDS_S)
    assert left == [], "processes that outlived the flow"
    assert set(matrix.jobs().values()) == {"STOPPED"}
    assert "interrupted; what was reached is kept" in run.output
    assert {run.info.status for run in matrix.mlflow_runs().values()} == {"KILLED"}
    assert matrix.parents() == ["KILLED"]
    assert list((matrix.pipeline.home / "leases").glob("*.json")) == []

    done = max(entry.epoch for entry in matrix.pipeline.reports())
    cells = matrix.plan()
    assert [cell["state"] for cell in cells] == ["resume", "resume"]
    # A job that is stopped between a checkpoint and its journal object has one epoch more than the journal says.
    assert all(0 < int(cell["why"].split()[3]) <= done + 1 for cell in cells), cells


@pytest.mark.soak
def test_changed_code_makes_cells_stale_and_retrains_them_when_asked(matrix: Matrix) -> None:
    matrix.write(training=EXPERIMENT["training"] | {"epochs": 1, "closing_epochs": 0})
    first, _ = matrix.finish()
    ((cell, row),) = first.items()
    losses = matrix.pipeline.repo / "models" / "losses.py"
    losses.write_text(losses.read_text().replace("BOX_WEIGHT = 5.0", "BOX_WEIGHT = 4.0"))

    (planned,) = matrix.plan()
    assert planned["state"] == "stale"
    assert "--on-code-change retrain" in planned["why"]
    again, _ = matrix.finish("--on-code-change", "retrain")
    assert (again[cell]["state"], again[cell]["run_key"]) == ("trained", row["run_key"])
    aside = matrix.pipeline.home / "superseded" / row["run_key"] / row["run_key"]
    assert (aside / "result.json").is_file()
    runs = matrix.mlflow_runs().values()
    assert sorted("speck.superseded_by" in run.data.tags for run in runs) == [False, True]
    versions = matrix.mlflow.search_model_versions("name = 'sample-aerial'")
    assert {version.tags["speck.data_licence"] for version in versions} == {"CC0-1.0"}
    reasons = {version.version: version.tags["speck.reason"] for version in versions}
    assert reasons.keys() == {1, 2}
    assert f"champion {row['run_key']} has" in reasons[2], "the new training was compared with the old one"
    (planned,) = matrix.plan("--on-code-change", "retrain")
    assert planned["state"] == "cached"

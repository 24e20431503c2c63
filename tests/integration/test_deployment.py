"""`prefect.yaml` as a user takes it up, in a copy of the checkout: server, `deploy --all`, worker, `deployment run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos.processes import marked, wait_until
from decided import champion
from finished import finish_run
from services.checkout import ROOT
from services.deployment import RUN_S, Deployed, deployed_checkout
from services.webhook import SECRET, Receiver, webhook_receiver

from data.report import HTML, JSON, LOCK, report_folder
from data.versioning import current_version
from flows.settings import Settings
from tracking.authority import open_authority
from tracking.client import connect
from training.records import RunResult, read_result

SMALL = ["training.epochs=1", "training.closing_epochs=0", "training.input_size_px=96"]
CELL = {"architectures": ["yolox-nano"], "datasets": ["sample-aerial"]}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with deployed_checkout(tmp_path_factory.mktemp("deployment")) as made, made.worker():
        yield made


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


@pytest.fixture(scope="module")
def receiver(deployed: Deployed, finished: Finished) -> Iterator[Receiver]:
    """Whom the automations of `speck automations` notify, from here on."""
    with webhook_receiver() as made, pytest.MonkeyPatch.context() as environment:
        environment.setenv("SPECK_WEBHOOK_URL", made.url)
        for verb in ("created", "unchanged"):
            done = deployed.speck("automations")
            assert done.returncode == 0, done.stdout + done.stderr
            assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [verb] * 4
            assert SECRET not in done.stdout + done.stderr
        yield made


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
    told = [line for line in deployed.log(finished.run_id) if line.startswith("yolox-nano / sample-aerial / seed 0: ")]
    assert len([line for line in told if ": epoch 1/1 done: loss " in line]) == 1
    assert len(set(told)) == len(told)


def test_a_run_started_meanwhile_is_cancelled(finished: Finished) -> None:
    assert finished.meanwhile["type"] == "CANCELLED"
    assert "is at work on the same" in finished.meanwhile["message"]


def test_the_same_run_again_trains_nothing(deployed: Deployed, finished: Finished) -> None:
    run_id = deployed.start(changes=SMALL, **CELL)
    assert deployed.end(run_id)["type"] == "COMPLETED"
    assert [line[1] for line in deployed.table(run_id, "plan")[2:]] == ["cached"]
    assert read_result(deployed.home / "runs" / finished.result.run_key) == finished.result


def test_retraining_on_unchanged_data_says_that_there_is_nothing_to_do(deployed: Deployed, finished: Finished) -> None:
    run_id = deployed.start(
        "retrain/default", changes=[*SMALL, "architectures=[yolox-nano]"], datasets=CELL["datasets"]
    )
    state = deployed.end(run_id)
    assert (state["type"], state["name"]) == ("COMPLETED", "Unchanged"), state["message"]
    version = finished.result.spec.dataset.version[:12]
    assert state["message"] == f"Nothing to do for 1 cell: sample-aerial unchanged, version {version}"


def test_a_champion_is_scored_again_under_another_protocol(deployed: Deployed, finished: Finished) -> None:
    asked = {"model": "models:/sample-aerial@champion", "split": "val", "protocol": "visdrone"}
    run_id = deployed.start("evaluate/default", **asked)
    state = deployed.end(run_id)
    assert state["type"] == "COMPLETED", state["message"]
    assert state["message"].startswith(f"run {finished.result.run_key} on sample-aerial val: coco/AP ")
    assert "visdrone/AP50" in "".join(deployed.artifact(run_id, "evaluation"))
    assert (deployed.home / "evaluations" / run_id / "report.html").is_file()


def test_every_parameter_is_explained_and_choices_are_offered(deployed: Deployed) -> None:
    for flow in ("train-all", "retrain", "evaluate", "promote"):
        form = deployed.service.request(f"/deployments/name/{flow}/default")["parameter_openapi_schema"]
        assert all(field["description"][0].isupper() for field in form["properties"].values()), flow
    assert "visdrone" in str(
        deployed.service.request("/deployments/name/evaluate/default")["parameter_openapi_schema"]["properties"][
            "protocol"
        ]
    )
    (schedule,) = deployed.service.request("/deployments/name/retrain/default")["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"


def test_the_server_plans_the_nightly_retraining(deployed: Deployed) -> None:
    """A cron line alone trains nothing: Prefect's scheduler has to make runs of it."""
    wanted = {"deployments": {"name": {"any_": ["default"]}}, "flows": {"name": {"any_": ["retrain"]}},
              "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}  # fmt: skip

    def planned() -> list[str]:
        runs = deployed.service.request("/flow_runs/filter", wanted)
        return [str(run["expected_start_time"]) for run in runs if run["auto_scheduled"]]

    wait_until(planned, 120, "a scheduled run", every_s=2)
    assert all("T02:00:00" in at for at in planned())


def test_the_page_of_a_cell_shows_progress_and_the_job(deployed: Deployed, finished: Finished) -> None:
    key = finished.result.run_key
    wanted = {"artifacts": {"flow_run_id": {"any_": [finished.run_id]}}, "limit": 50}
    shown = {one["key"]: one for one in deployed.service.request("/artifacts/filter", wanted)}
    assert (shown[f"progress-{key}"]["type"], shown[f"progress-{key}"]["data"]) == ("progress", 100.0)
    assert f"/#/jobs/{key}-1" in shown[f"ray-{key}"]["data"]
    # What the job prints beside what is said to people.
    assert any(
        "[speck]" not in line and "Started training worker group" in line for line in deployed.log(finished.run_id)
    )


def test_a_promotion_waits_for_a_person_and_keeps_the_comment(
    deployed: Deployed, finished: Finished, receiver: Receiver
) -> None:
    settings = Settings()
    spec = finished.result.spec.model_copy(update={"seed": 1})
    better = finish_run(spec, deployed.repo / "data" / "processed" / "sample-aerial", settings, share=1.0)
    client = connect(settings.tracking_uri)

    def holder() -> str:
        version = champion(client, "sample-aerial")
        assert version is not None
        return version.run_key

    run_id = deployed.start("promote/default", dataset="sample-aerial", run=better.run_key)
    wait_until(lambda: deployed.state(run_id)["name"] == "Suspended", 120, "a promotion that waits", every_s=0.5)
    assert holder() == finished.result.run_key
    assert "would become champion" in deployed.artifact(run_id, "promotion-sample-aerial")[0]
    answer = {"approve": True, "comment": "seen on the roof pictures"}
    deployed.service.request(f"/flow_runs/{run_id}/resume", {"run_input": answer})
    state = deployed.end(run_id)
    assert (state["type"], state["name"]) == ("COMPLETED", "Promoted"), state["message"]
    assert holder() == better.run_key
    newest = open_authority(None, settings.home).entries("sample-aerial")[-1]
    assert (newest.action, newest.run_key) == ("promoted", better.run_key)
    assert newest.why.startswith("seen on the roof pictures; superior in coco/AP: 1.0000")
    wait_until(lambda: receiver.told("promoted"), 60, "news of the promotion", every_s=0.5)
    (news,) = receiver.told("promoted")
    told = news["verdict"]
    assert (told["dataset"], told["run_key"], told["reason"]) == ("sample-aerial", better.run_key, newest.why)
    assert all(row["passed"] for row in told["verdict"])


def test_cancelling_in_prefect_stops_the_cell_and_leaves_it_resumable(deployed: Deployed, finished: Finished) -> None:
    changes = [*SMALL, "training.epochs=500"]
    run_id = deployed.start(changes=changes, **CELL)
    folders = deployed.home / "runs"

    def epochs() -> list[Path]:
        return [path for path in folders.glob("*/journal/*.json") if finished.result.run_key not in path.parts]

    wait_until(lambda: len(epochs()) >= 2, RUN_S, "two epochs", every_s=0.5)
    deployed.cancel(run_id)
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
        cwd=deployed.repo, env=environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    (cell,) = json.loads(plan.stdout)["cells"]
    assert (cell["run_key"], cell["state"]) == (run_folder.name, "resume")


@pytest.mark.soak
def test_changed_data_seen_by_train_all_starts_a_retraining_which_can_be_cancelled(
    deployed: Deployed, receiver: Receiver
) -> None:
    known = {run["id"] for run in deployed.runs_of("retrain")}
    recipe = deployed.repo / "data/raw/sample-aerial/recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"seed": 77}))
    run_id = deployed.start(changes=SMALL, **CELL)

    def started() -> list[dict[str, Any]]:
        return [run for run in deployed.runs_of("retrain") if run["id"] not in known and run["state_type"] == "RUNNING"]

    wait_until(started, RUN_S, "a retraining", every_s=0.5)
    (retraining,) = started()
    assert retraining["parameters"]["datasets"] == ["sample-aerial"]
    wait_until(lambda: any("workers: " in line for line in deployed.log(retraining["id"])), RUN_S, "a job", every_s=0.5)
    deployed.cancel(retraining["id"])
    assert deployed.end(retraining["id"])["type"] == "CANCELLED"
    assert deployed.end(run_id)["type"] == "COMPLETED"
    wait_until(lambda: not marked(deployed.mark, "ray::"), 60, "the end of the workers", every_s=0.5)


def test_a_misspelt_architecture_fails_the_run_with_the_nearest_name(deployed: Deployed, receiver: Receiver) -> None:
    state = deployed.end(deployed.start(architectures=["yolox-nan"]))
    assert state["type"] == "FAILED"
    why = "UnknownArchitecture: 'yolox-nan' is not known. Did you mean 'yolox-nano'?"
    assert why in state["message"]
    wait_until(lambda: receiver.told("failed"), 60, "news of the failure", every_s=0.5)
    (news,) = receiver.told("failed")
    assert (news["flow"], why in news["why"]) == ("train-all", True)
    assert news["page"].startswith(deployed.service.url)


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

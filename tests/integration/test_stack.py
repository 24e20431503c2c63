"""`speck up` as a user starts it, from a copy of the checkout: real servers under a real supervisor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from botocore.exceptions import ClientError
from chaos.processes import described, wait_until
from decided import champion
from leaks import leaks, secrets_of
from listeners import OPEN_TO_ALL, beyond_loopback, without_token
from playwright.sync_api import Page, expect
from services.browser import browser_page
from services.stack import Running, ports_in_use, stack_of_a_copy
from websockets import ConnectionClosed, Subprotocol
from websockets.sync.client import connect as open_socket

from data.versioning import current_version
from infra.processes import is_alive, still_alive
from infra.servers import status
from tracking.authority import open_authority
from tracking.client import connect
from training.checkpoint import Manifest

SMALL = ["training.epochs=1", "training.closing_epochs=0", "training.input_size_px=96"]
ARCHITECTURES = ["yolox-nano", "foreground-probe-n"]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with stack_of_a_copy() as running:
        yield running


def test_everything_works_and_the_table_says_so(running: Running) -> None:
    shown = running.speck("status")
    assert shown.returncode == 0, shown.stdout
    rows = running.status()
    assert {name: row["fault"] for name, row in rows.items()} == dict.fromkeys(running.stack.services)
    assert all(is_alive(psutil.Process(row["pid"])) for row in rows.values())
    assert f"source {running.stack.home}/stack.env" in running.printed
    assert all(name in shown.stdout and name in running.printed for name in running.stack.services)


def test_ray_has_two_nodes_that_share_the_machines_cpus(running: Running) -> None:
    script = "import json; from ray.util.state import list_nodes as n; import os\n"
    script += (
        "print(json.dumps([[x.node_ip, x.resources_total.get('CPU', 0)] for x in n(os.environ['SPECK_RAY_JOBS_URL'])]))"
    )
    done = running.sourced(f'python -c "{script}"')
    nodes = dict(json.loads(done.stdout.splitlines()[-1]))
    assert nodes.keys() == {"127.0.0.2", "127.0.0.3"}, done.stderr
    assert sum(nodes.values()) == len(os.sched_getaffinity(0))


def basic(user: str, password: str) -> str:
    from infra.servers import Credentials

    return Credentials(user, password, "").basic


def test_each_api_refuses_whoever_has_no_right_credentials(running: Running) -> None:
    stack = running.stack
    wrong = [None, basic("speck", "wrong"), basic("speck", ""), basic("", ""), basic("admin", "password1234"),
             basic("admin", "pass")]  # fmt: skip
    mlflow = [f"{stack.url('mlflow')}/api/2.0/mlflow/{path}" for path in
              ("experiments/get?experiment_id=0", "registered-models/search", "users/get?username=speck")]  # fmt: skip
    others = ("api/2.0/mlflow-artifacts/artifacts", "ajax-api/2.0/mlflow/experiments/search", "get-artifact?path=x")
    mlflow += [f"{stack.url('mlflow')}/{path}" for path in others]
    prefect = [
        f"{stack.api_url}/{path}" for path in ("admin/version", "admin/settings", "flow_runs/count", "work_pools/speck")
    ]
    names = ("api/version", "api/jobs/", "nodes?view=summary", "api/v0/logs", "api/cluster_status", "metrics")
    ray = [f"{stack.url('ray-head')}/{name}" for name in names]
    tokens = [*wrong, "Bearer ", "Bearer wrong"]
    answers = {
        (url, authorization): status(url, authorization)
        for urls, forms in ((mlflow, wrong), (prefect, wrong), (ray, tokens))
        for url in urls
        for authorization in forms
    }
    assert {key: answer for key, answer in answers.items() if answer not in {401, 403}} == {}
    assert status(prefect[0], stack.credentials.basic) == status(mlflow[0], stack.credentials.basic) == 200


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out"])
def test_prefects_sockets_close_on_whoever_has_no_right_password(running: Running, path: str) -> None:
    credentials, answers = running.stack.credentials, {}
    right = f"{credentials.user}:{credentials.password}"
    for token in (None, "", "speck:", "speck:wrong", right):
        address = f"{running.stack.api_url.replace('http', 'ws', 1)}/{path}"
        with open_socket(address, subprotocols=[Subprotocol("prefect")]) as socket:
            socket.send(json.dumps({"type": "auth", "token": token}))
            try:
                answers[token] = json.loads(socket.recv(timeout=300))["type"]
            except ConnectionClosed as closed:
                answers[token] = closed.rcvd and closed.rcvd.code
    assert answers == {None: 1008, "": 1008, "speck:": 1008, "speck:wrong": 1008, right: "auth_success"}


@pytest.mark.parametrize(
    ("key", "secret"), [("speck", "wrong"), ("speck", " "), ("minioadmin", "minioadmin"), (" ", " "), ("test", "test")]
)
def test_s3_refuses_wrong_keys(running: Running, key: str, secret: str) -> None:
    with pytest.raises(ClientError) as raised:
        running.s3(key, secret).list_objects_v2(Bucket="speck")
    assert raised.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert status(f"{running.stack.url('s3')}/speck") == 403


@pytest.mark.parametrize("password", ["wrong", "", "postgres", "speck"])
def test_postgres_refuses_wrong_passwords(running: Running, password: str) -> None:
    if not running.stack.has_postgres:
        pytest.skip("needs PostgreSQL's programs, and pip install 'psycopg[binary]'")
    import psycopg

    port = running.stack.ports["postgres"]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(host="127.0.0.1", port=port, user="speck", password=password, dbname="mlflow")


def test_only_rays_daemons_listen_beyond_the_loopback_and_refuse_whoever_has_no_token(running: Running) -> None:
    listening = beyond_loopback(running)
    assert {name for name, _ in listening} == OPEN_TO_ALL
    assert {(name, without_token(port)) for name, port in listening} == {(name, "refused") for name in OPEN_TO_ALL}


def test_a_killed_service_starts_again_though_it_left_a_process_at_its_port(running: Running) -> None:
    before = running.status()["s3"]["pid"]
    (server,) = psutil.Process(before).children()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: (now := running.status()["s3"])["fault"] is None and now["pid"] != before, 60, "S3", every_s=0.5)
    assert not is_alive(server)
    (server,) = psutil.Process(running.status()["s3"]["pid"]).children()
    server.kill()
    wait_until(lambda: not is_alive(server), 10, "its end")
    wait_until(lambda: running.status()["s3"]["fault"] is None, 60, "S3 once more", every_s=0.5)


def test_up_again_starts_what_is_down_and_leaves_the_rest(running: Running) -> None:
    before = running.status()
    configuration = str(running.stack.home / "supervisord.conf")
    stop = [sys.executable, "-m", "supervisor.supervisorctl", "-c", configuration, "stop", "s3"]
    stopped = subprocess.run(stop, capture_output=True, text=True, check=False)
    assert stopped.stdout == "s3: stopped\n", stopped.stderr
    seen = running.speck("status")
    assert seen.returncode == 1
    assert "down (stopped)" in seen.stdout
    again = running.speck("up")
    assert again.returncode == 0, again.stdout + again.stderr
    after = running.status()
    assert {name for name in after if after[name]["pid"] != before[name]["pid"]} == {"s3"}
    assert {row["fault"] for row in after.values()} == {None}


def test_logs_of_one_service_and_of_all(running: Running) -> None:
    assert "/api/2.0/mlflow/" in running.speck("logs", "mlflow").stdout
    assert {line.split()[0] for line in running.speck("logs").stdout.splitlines()} >= {"s3", "prefect", "ray-head"}
    refused = running.speck("logs", "mlfow")
    assert refused.returncode == 1
    assert "'mlfow' is no service of the stack. Did you mean 'mlflow'?" in refused.stderr
    command = [sys.executable, "-m", "flows", "logs", "s3", "--follow"]
    with subprocess.Popen(
        command, cwd=running.repo, env=running.environment, stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        assert "Starting s3 server" in following.stdout.readline()
        with (running.stack.logs / "s3.log").open("a") as log:
            log.write("written just now\n")
        while "written just now" not in (line := following.stdout.readline()):
            assert line, "it ended"
        following.kill()


@pytest.fixture(scope="module")
def trained(running: Running) -> str:
    """The id of a flow run that was started from a shell."""
    run_id = running.start(changes=SMALL, architectures=ARCHITECTURES, datasets=["sample-aerial"])
    running.end(run_id)
    return run_id


@pytest.mark.soak
def test_a_deployment_run_from_a_shell_finishes_all_cells_and_promotes(
    running: Running, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = running.state(trained)
    assert state["type"] == "COMPLETED", state["message"] + running.speck("logs", "worker").stdout[-3000:]
    keys = running.objects("")
    assert len([key for key in keys if key.startswith("runs/") and key.endswith("/result.json")]) == len(ARCHITECTURES)
    assert [key for key in keys if key.startswith("mlflow/") and key.endswith("report.html")]
    version = current_version("sample-aerial", running.repo)
    assert version is not None
    assert f"dvc/files/md5/{version.version[:2]}/{version.version[2:]}.dir" in keys
    assert not (running.stack.home / "mlflow.db").exists() or not running.stack.has_postgres

    for name, value in running.stack.client_environment().items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    holder = champion(connect(running.stack.url("mlflow")), "sample-aerial")
    assert holder is not None
    (entry,) = open_authority(None, running.stack.home).entries("sample-aerial")
    assert (entry.action, entry.champion, entry.run_key) == ("promoted", holder.version, holder.run_key)


@pytest.mark.soak
def test_the_pages_of_prefect_and_mlflow_show_what_was_trained_and_promoted(running: Running, trained: str) -> None:
    with prefect_page(running, trained) as page:
        expect(page.get_by_text("Completed").first).to_be_visible()
        assert trained in page.url, "not sent back to the login"
        page.get_by_text("Task Runs", exact=True).first.click()
        tasks = [f"{architecture} / sample-aerial / seed 0" for architecture in ARCHITECTURES]
        for shown in ("version sample-aerial", *tasks, "promote sample-aerial"):
            expect(page.get_by_text(shown).filter(visible=True).first).to_be_visible()
        page.get_by_text("Artifacts", exact=True).first.click()
        for key in ("leaderboard", "promotion-sample-aerial", "data-sample-aerial"):
            expect(page.get_by_text(key).filter(visible=True).first).to_be_visible()
    credentials = {"username": running.stack.credentials.user, "password": running.stack.credentials.password}
    with browser_page(http_credentials=credentials) as page:
        page.goto(f"{running.stack.url('mlflow')}/#/models/sample-aerial")
        expect(page.get_by_text("champion").first).to_be_visible()
        page.get_by_text("Version 1").first.click()
        expect(page.get_by_text("Where it comes from").first).to_be_visible()
        page.goto(f"{running.stack.url('mlflow')}/#/experiments")
        # It opens for language models.
        page.get_by_text("Model training").first.click()
        page.get_by_text("sample-aerial", exact=True).first.click()
        expect(page.get_by_text(ARCHITECTURES[0]).first).to_be_visible()
        assert "/experiments/" in page.url
        for architecture in ARCHITECTURES:
            expect(page.get_by_text(architecture).first).to_be_visible()


@pytest.mark.soak
def test_a_person_agrees_to_a_promotion_in_prefects_page(running: Running, trained: str) -> None:
    gates = running.repo / "flows/gates/sample-aerial.yaml"
    gates.write_text("rule: non_inferior\nmargin: 0.5\nmax_drop: {}\nmax_class_drop: null\n")
    authority = open_authority(None, running.stack.home)
    (first,) = authority.entries("sample-aerial")
    found = {key.split("/")[1] for key in running.objects("runs/") if key.endswith("/result.json")}
    (other,) = found - {first.run_key}
    run_id = running.start("promote/default", dataset="sample-aerial", run=other)
    wait_until(lambda: running.state(run_id)["name"] == "Suspended", 300, "the question", every_s=2)
    with prefect_page(running, run_id) as page:
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_text("would become champion").first).to_be_visible()
        expect(page.get_by_role("cell", name="lineage")).to_be_visible()
        page.locator("textarea").last.fill("looked at the roof pictures")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("Promoted", exact=True).first).to_be_visible(timeout=300_000)
    newest = authority.entries("sample-aerial")[-1]
    assert (newest.action, newest.run_key, newest.generation) == ("promoted", other, 2)
    assert newest.why.startswith("looked at the roof pictures; ")
    gates.unlink()


@contextmanager
def prefect_page(running: Running, run_id: str) -> Iterator[Page]:
    """A flow run's page, for whoever signs in."""
    url, credentials = running.stack.url("prefect"), running.stack.credentials
    with browser_page() as page:
        page.goto(f"{url}/login")
        page.locator("input").first.fill(f"{credentials.user}:{credentials.password}")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Flows").first).to_be_visible()
        page.goto(f"{url}/runs/flow-run/{run_id}")
        yield page


def test_doctor_finds_the_stack_sound(running: Running) -> None:
    done = running.sourced("speck doctor --json" if shutil.which("speck") else "python -m flows doctor --json")
    checks = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    told = {check["what"] for check in checks if check["level"] == "OK"}
    assert {"Prefect", "MLflow", "Ray", "S3", "DVC remote", "credentials", "clocks"} <= told, checks


def test_no_secret_is_anywhere_but_where_it_belongs(running: Running) -> None:
    """After a flow that failed, with a traceback in its log."""
    failed = running.end(running.start(architectures=["yolox-nan"]))
    assert failed["type"] == "FAILED"
    # Lines arrive after the state.
    wanted = {"limit": 200, "sort": "TIMESTAMP_DESC"}
    wait_until(lambda: "Traceback" in str(running.prefect("/logs/filter", wanted)), 60, "a traceback", every_s=0.5)
    assert min(len(secret) for secret in secrets_of(running.stack).values()) >= 32
    assert len(running.commands) > 50
    assert leaks(running) == []
    assert stat.S_IMODE(running.stack.sockets.stat().st_mode) == 0o700


@pytest.mark.soak
def test_nor_did_a_training_leave_one_anywhere(running: Running, trained: str) -> None:
    assert running.state(trained)["type"] == "COMPLETED"
    assert leaks(running) == []


def test_the_search_for_secrets_finds_what_is_planted(running: Running) -> None:
    stack, secret = running.stack, secrets_of(running.stack)
    (stack.logs / "worker.log").open("a").write(f"token is {secret['Ray token']}\n")
    object_name = "runs/planted/ledger.json"
    running.s3().put_object(Bucket="speck", Key=object_name, Body=f"<{secret['session key']}>".encode())
    running.prefect("/variables/", {"name": "planted", "value": secret["password in a header"]})
    (stack.home / "ray_token").chmod(0o640)
    argument = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)", secret["PostgreSQL secret"]])
    script = """
import os, mlflow
from ray.job_submission import JobSubmissionClient
JobSubmissionClient(os.environ["SPECK_RAY_JOBS_URL"]).submit_job(
    entrypoint="true", runtime_env={"env_vars": {"PLANTED": os.environ["AWS_SECRET_ACCESS_KEY"]}})
mlflow.MlflowClient().set_experiment_tag("0", "planted", os.environ["MLFLOW_TRACKING_PASSWORD"])
"""
    done = running.sourced(f"python - <<'END'\n{script}\nEND")
    assert done.returncode == 0, done.stderr
    argument.wait()
    found = leaks(running)
    for place, name in (
        (f"{stack.logs / 'worker.log'}", "Ray token"), (f"{stack.home / 's3/speck' / object_name}", "session key"),
        ("Prefect's variables", "password in a header"), (f"{stack.home / 'ray_token'}, which is not its", "Ray token"),
        ("argument", "PostgreSQL secret"), ("Ray's api/jobs/", "S3 secret"), ("MLflow's experiments", "password"),
    ):  # fmt: skip
        assert any(line.startswith(place) and name in line for line in found), (place, found)
    (stack.home / "ray_token").chmod(0o600)


@pytest.mark.soak
def test_down_leaves_no_process_and_no_port_and_up_goes_on(running: Running, trained: str) -> None:
    cut_off = running.start(architectures=["yolox-nano"], changes=["training.epochs=1000"])
    wait_until(lambda: "epoch 1/1000" in running.log(cut_off), 240, "a training", every_s=2)
    steps_per_epoch = int(running.log(cut_off).rpartition(" step ")[2].split()[0].partition("/")[2]) // 1000
    processes = running.processes()
    assert len(ports_in_use(running.stack)) >= 6
    done = running.speck("down")
    assert done.returncode == 0, done.stderr
    assert "was under way and is marked as crashed" in done.stdout
    assert "is asked to keep a checkpoint and stop" in done.stdout
    assert "have not stopped" not in done.stdout
    manifests = running.stack.home.glob("s3/**/checkpoints/*/manifest.json")
    newest = Manifest.model_validate_json(max(manifests, key=lambda path: path.stat().st_mtime_ns).read_bytes())
    assert newest.step % steps_per_epoch != 0, "a checkpoint within an epoch"
    assert described(still_alive(processes, 60)) == []
    assert ports_in_use(running.stack) == set()
    assert running.speck("status").returncode == 1
    assert "was not running" in running.speck("down").stdout

    again = running.speck("up")
    assert again.returncode == 0, again.stdout + again.stderr
    assert running.state(trained)["type"] == "COMPLETED"
    assert running.state(cut_off)["message"] == "the stack was stopped; the next run goes on from the newest checkpoint"
    for_shell = running.sourced("python -m flows history sample-aerial --json")
    assert json.loads(for_shell.stdout)["decisions"][0]["action"] == "promoted", for_shell.stderr

"""The command line as a user meets it: quick help, errors that say what to type instead, JSON for programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

import flows.experiment
from flows.cli import app, main
from flows.settings import Settings
from models import ARCHITECTURES
from training.spec import RunSpec

ROOT = Path(__file__).parents[3]
CALL = """
import sys
from flows.cli import main
try:
    main()
finally:
    print("imported:", *sorted({"prefect", "ray", "torch", "mlflow"} & sys.modules.keys()), file=sys.stderr)
"""

Answer = tuple[int, str, str]
Speck = Callable[..., Answer]


@pytest.fixture
def speck(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Settings
) -> Callable[..., Answer]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["speck", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code or 0
        printed = capsys.readouterr()
        return int(code), printed.out, printed.err

    return call


def in_a_process(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SPECK_HOME": str(home), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", CALL, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def what_is_in(home: Path) -> list[Path]:
    return sorted(home.rglob("*"))


def test_help_lists_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    answer = in_a_process(tmp_path / "home", "--help")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands.keys() >= {"train-all", "train", "plan", "evaluate", "history", "models", "data"}
    assert [name for name in commands if f" {name} " not in answer.stdout] == []
    assert (answer.returncode, answer.stderr.split()) == (0, ["imported:"])
    assert what_is_in(tmp_path / "home") == []


def test_the_version_is_that_of_the_installed_package(speck: Speck, settings: Settings) -> None:
    assert speck("--version") == (0, f"{version('speck')}\n", "")
    assert what_is_in(settings.home) == []


def test_a_misspelt_name_starts_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    answer = in_a_process(tmp_path / "home", "train", "yolox-nan", "sample-aerial")
    error, imported = answer.stderr.splitlines()
    assert answer.returncode == 1
    assert error.startswith("UnknownArchitecture: 'yolox-nan' is not known. Did you mean 'yolox-nano'? Known: ")
    assert imported == "imported: torch"
    assert (answer.stdout, what_is_in(tmp_path / "home")) == ("", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train yolox-nano sample-arial", "UnknownDataset: dataset 'sample-arial' is not known. Did you mean 'sample-"),
        ("train-all --architectures yolox-nano,yolox-sm", "UnknownArchitecture: 'yolox-sm' is not known. Did you mean"),
        ("train-all --set training.epoch=3", "training.epoch: unknown key. Did you mean 'epochs'?"),
        ("train-all --set training.epochs=many", "training.epochs: Input should be a valid integer"),
        ("plan --set training.epochs", "BadExperiment: --set 'training.epochs': expected key.path=value"),
        ("plan --spec defalt", "BadExperiment: 'defalt' is no experiment in flows/runs. Did you mean 'default'?"),
        ("plan --spec no/such.yaml", "BadExperiment: no/such.yaml: no such experiment file"),
        ("evaluate 0123", "UnknownRun: '0123' must begin the key of exactly one finished run; none does."),
        ("data check sample-arial", "UnknownDataset: dataset 'sample-arial' is not known. Did you mean 'sample-"),
        ("history sample-arial", "UnknownDataset: dataset 'sample-arial' is not known. Did you mean 'sample-"),
    ],
)
def test_an_error_of_the_user_is_one_message_and_exit_code_1(
    speck: Speck, settings: Settings, arguments: str, message: str
) -> None:
    code, out, err = speck(*arguments.split())
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert what_is_in(settings.home) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --seeds 0,first", "seeds are whole numbers"),
        ("evaluate 0123 --split training", "'training' is not one of 'val', 'test', 'train'"),
        ("trian", "No such command 'trian'"),
        ("plan --sed 0", "No such option: --sed"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    speck: Speck, settings: Settings, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = speck(*arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert what_is_in(settings.home) == []


def test_a_fault_of_ours_keeps_its_traceback(speck: Speck, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(flows.experiment, "load_experiment", fault)
    with pytest.raises(ZeroDivisionError):
        speck("plan")


def test_ctrl_c_says_how_to_go_on(speck: Speck, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flows.experiment, "load_experiment", interrupt)
    code, _, err = speck("plan")
    assert code == 130
    assert "run the same command to go on" in err


def test_plan_json_tells_every_cell_and_writes_nothing(speck: Speck, settings: Settings) -> None:
    axes = ("--datasets", "sample-aerial", "--architectures", "yolox-nano,yolox-tiny", "--seeds", "0, 5")
    axes += ("--set", "training.input_size_px=64", "--set", "training.batch_size=4")  # the probe's step is a short one
    code, out, _ = speck("plan", "--json", *axes)
    answer = json.loads(out)
    assert (code, answer["unversioned_datasets"]) == (0, [])
    assert [(cell["architecture"], cell["seed"], cell["state"]) for cell in answer["cells"]] == [
        (architecture, seed, "train") for architecture in ("yolox-nano", "yolox-tiny") for seed in (0, 5)
    ]
    assert len({cell["run_key"] for cell in answer["cells"]}) == 4
    assert what_is_in(settings.home) == []
    text = speck("plan", *axes)[1]
    first, *lines, total = text.splitlines()
    assert first == f"sample-aerial: version {answer['cells'][0]['dataset_version'][:12]}"
    assert [
        re.findall(r": train \((\w+)\): nothing was trained .*; about .* \(from probe\)", line) for line in lines
    ] == [[cell["run_key"]] for cell in answer["cells"]]
    assert total.startswith("4 cells, 4 to train: about ")
    assert all(cell["estimated_s"] > 0 and cell["estimated_disk_bytes"] > 2**20 for cell in answer["cells"])


def test_plan_writes_the_specs_that_the_loop_takes(speck: Speck, settings: Settings, tmp_path: Path) -> None:
    axes = ("--datasets", "sample-aerial", "--architectures", "yolox-nano", "--seeds", "0,5")
    axes += ("--set", "training.input_size_px=64", "--set", "training.batch_size=4")
    code, out, err = speck("plan", "--json", *axes, "--specs", str(tmp_path / "new" / "specs"))
    keys = [cell["run_key"] for cell in json.loads(out)["cells"]]
    files = sorted((tmp_path / "new" / "specs").iterdir())
    assert (code, [path.name for path in files]) == (0, sorted(f"{key}.json" for key in keys))
    assert [RunSpec.model_validate_json(path.read_bytes()).run_key for path in files] == sorted(keys)
    assert "2 specs are in" in err


@pytest.mark.parametrize("command", [("train-all",), ("train", "yolox-nano", "sample-aerial")])
@pytest.mark.parametrize("option", [("--profile",), ("--set", "compute.profile=true"), ()])
def test_a_profile_is_a_setting_of_compute(
    speck: Speck, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], option: tuple[str, ...]
) -> None:
    seen: list[bool] = []

    def loaded(spec: str, sets: Sequence[str], **axes: Any) -> None:
        seen.append(load_experiment(spec, sets, **axes).compute.profile)
        raise flows.experiment.BadExperiment("that is all")

    load_experiment = flows.experiment.load_experiment
    monkeypatch.setattr(flows.experiment, "load_experiment", loaded)
    assert speck(*command, *option)[0] == 1
    assert seen == [bool(option)]


@pytest.mark.parametrize("option", ["--seeds", "--architectures", "--datasets"])
def test_an_empty_option_is_not_taken_for_none(speck: Speck, option: str) -> None:
    code, _, err = speck("plan", option, "")
    assert code == 2
    assert "need a value" in err


def test_a_plan_says_of_new_data_that_it_waits(speck: Speck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.versioning.planned_version", lambda *_: None)
    code, out, _ = speck("plan", "--datasets", "sample-aerial", "--architectures", "yolox-nano", "--seeds", "0,1")
    first, total = out.splitlines()
    assert code == 0
    assert re.match(r"sample-aerial: (new|changed since version \w{12}): train-all prepares it, .* of 2 cells", first)
    assert total == "0 cells, 0 to train; 2 more wait for their data to be prepared"


def test_models_json_is_the_table_of_architectures(speck: Speck) -> None:
    code, out, _ = speck("models", "--json")
    assert code == 0
    assert json.loads(out).keys() == ARCHITECTURES.keys()
    assert json.loads(out)["yolox-nano"]["width"] == 0.25


def test_data_list_json_names_every_card(speck: Speck) -> None:
    code, out, _ = speck("data", "list", "--json")
    assert code == 0
    assert {dataset["name"] for dataset in json.loads(out)} == {
        path.stem for path in (ROOT / "data" / "catalog").glob("*.yaml")
    }


def test_a_command_tells_the_libraries_to_keep_quiet_and_what_the_user_set_stays(
    speck: Speck, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "perhaps")
    for name in ("PREFECT_HOME", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    assert speck("models", "--json")[0] == 0
    assert os.environ["DO_NOT_TRACK"] == "perhaps"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["PREFECT_HOME"] == str(settings.home / "prefect")


def test_a_prefect_server_named_in_the_environment_keeps_its_own_home(
    speck: Speck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    assert speck("models", "--json")[0] == 0
    assert "PREFECT_HOME" not in os.environ


def test_an_empty_prefect_api_url_names_no_server(speck: Speck, settings: Settings) -> None:
    os.environ["PREFECT_API_URL"] = ""
    os.environ.pop("PREFECT_HOME", None)
    code, _, err = speck("automations")
    assert code == 1
    assert err.startswith("NoServer: PREFECT_API_URL names no Prefect server")
    assert "PREFECT_API_URL" not in os.environ
    assert os.environ["PREFECT_HOME"] == str(settings.home / "prefect")


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SPECK_HOME", "SPECK_RAY_JOBS_URL", "SPECK_STORAGE", "MLFLOW_TRACKING_URI")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    unset = Settings()
    for name in names:
        monkeypatch.setenv(name, "")
    assert Settings() == unset
    assert (unset.home.name, unset.ray_jobs_url) == (".speck", None)

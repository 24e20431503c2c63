"""The rules of the house that no other tool checks."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
MODULES = sorted(path for package in PACKAGES for path in ROOT.joinpath(*package.split(".")).glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RAY_FILES = {"worker.py", "launch.py", "retry.py", "job.py", "cluster.py", "jobs.py", "scoring_job.py"}
MAX_LINES = 400


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports at any depth, except for type checking alone."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
        pending += ast.iter_child_nodes(node)
    return names


def test_the_rules_below_look_at_the_whole_project() -> None:
    folders = {path.parent for path in ROOT.glob("[a-z]*/*.py")} - {ROOT / "tests"}
    assert {relative(folder) for folder in folders} == {package for package in PACKAGES if "." not in package}
    assert len(MODULES) > 50
    assert "ray" in imported(ROOT / "training" / "jobs.py"), "lazy imports count"
    assert "mlflow" not in imported(ROOT / "flows" / "record.py"), "imports for type checking do not"


def test_our_package_names_mean_our_packages(tmp_path: Path) -> None:
    code = "import importlib.util as u, sys; print(*(u.find_spec(name).origin for name in sys.argv[1:]), sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code, *PACKAGES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    places = [str(ROOT.joinpath(*package.split("."), "__init__.py")) for package in PACKAGES]
    assert found.stdout.split("\n")[:-1] == places


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=relative)
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert path.stem not in {"utils", "common", "helpers", "core"}


def test_each_framework_stays_in_its_room() -> None:
    strays = [
        f"{relative(path)} imports {name}"
        for path in MODULES
        for name in imported(path) & {"ray", "prefect", "mlflow"}
        if not {
            "ray": path.name in RAY_FILES,
            "prefect": path.parent.name == "flows",
            "mlflow": path.parent.name == "tracking",
        }[name]
    ]
    assert strays == []


def test_no_package_below_tests_shadows_ours() -> None:
    assert [relative(path) for path in TESTS if path.name == "__init__.py"] == []


def test_every_test_can_fail() -> None:
    assert [name for path in TESTS if path.name.startswith("test_") for name in _without_assertion(path)] == []


def _without_assertion(path: Path) -> Iterator[str]:
    functions = {
        node.name: node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.FunctionDef)
    }
    checking = {name for name, node in functions.items() if _asserts(node)}
    while more := {
        name for name, node in functions.items() if name not in checking and _names(node) & checking
    }:  # fmt: skip
        checking |= more
    tests = [name for name in functions if name.startswith("test_")]
    yield from (f"{relative(path)}::{name}" for name in tests if name not in checking)
    if not tests:
        yield f"{relative(path)} holds no test"


def _asserts(function: ast.FunctionDef) -> bool:
    """An assert statement, or one of the calls that fail by themselves."""
    calls = {"raises", "warns", "fail"}
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and (node.attr in calls or node.attr.startswith("assert_")))
        for node in ast.walk(function)
    )


def _names(function: ast.FunctionDef) -> set[str]:
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


def test_the_readme_names_only_targets_that_exist() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    named = set(re.findall(r"(?:^|[`;&]\s*)make ([a-z][a-z-]*)", code, re.MULTILINE))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named - targets == set()
    assert "check" in named, "the pattern finds what the pages say"


def test_deployments_name_flows_that_exist_and_no_folder_of_a_machine() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert re.findall(r"(?<![\w./])/\w+", text) == []
    for deployment in yaml.safe_load(text)["deployments"]:
        *module, name = deployment["entrypoint"].split(".")
        tree = ast.parse((ROOT.joinpath(*module).with_suffix(".py")).read_bytes())
        (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert [ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list] == ["flow"]
        assert deployment["parameters"].keys() <= {argument.arg for argument in function.args.args}
        assert deployment["enforce_parameter_schema"] is True

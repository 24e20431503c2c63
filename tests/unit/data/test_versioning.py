"""What can be told without running DVC; the rest is in tests/integration/test_versioning.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from data.versioning import VersioningFailed, current_version, version_dataset

ROOT = Path(__file__).parents[3]
CONFLICTED = """schema: '2.0'
stages:
<<<<<<< HEAD
  prepare@tiny:
=======
>>>>>>> other
"""


@pytest.mark.parametrize(
    "text", ["", CONFLICTED, "- 1", "stages: 1", "stages:\n  prepare@tiny: {}", "stages:\n  prepare@tiny: {outs: [{}]}"]
)
def test_a_damaged_lock_is_named_with_its_remedy(
    coco_folder: Callable[..., Path], make_repo: Callable[..., Path], text: str
) -> None:
    repo = make_repo(coco_folder())
    (repo / ".git").mkdir()
    (repo / "dvc.lock").write_text(text)
    for read in (current_version, version_dataset):
        with pytest.raises(VersioningFailed, match=rf"{re.escape(str(repo))}/dvc\.lock: .* `git checkout dvc\.lock`"):
            read("tiny", repo)


def test_a_lock_without_the_dataset_is_sound(make_repo: Callable[..., Path]) -> None:
    repo = make_repo()
    (repo / "dvc.lock").write_text("schema: '2.0'\n")
    assert current_version("tiny", repo) is None


def test_a_folder_that_is_no_git_repository(coco_folder: Callable[..., Path], make_repo: Callable[..., Path]) -> None:
    with pytest.raises(VersioningFailed, match=r"no \.git in it.* `git init && git add -A && git commit"):
        version_dataset("tiny", make_repo(coco_folder()))


def _imported(path: Path) -> Iterator[Path]:
    """Modules of this project that a module imports at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        candidates = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names)
        yield from (candidate for candidate in candidates if candidate.is_file())


def test_the_stage_depends_on_all_code_that_prepares() -> None:
    closure, pending = set[Path](), {ROOT / "data" / "prepare.py"}
    while pending:
        closure |= pending
        pending = {module for path in pending for module in _imported(path)} - closure
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["prepare"]["deps"]
    files = {ROOT / dep for dep in deps}
    assert {str(path.relative_to(ROOT)) for path in closure if not files & {path, *path.parents}} == set()
    assert ROOT / "data" / "samples" / "aerial_paint.py" in closure, "imports of imports are followed"

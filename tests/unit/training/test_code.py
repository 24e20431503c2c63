from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from training.code import training_code_hash

ROOT = Path(__file__).parents[3]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy of the packages' code, with an architecture more."""
    for package in ("models", "data", "evaluation", "training"):
        for path in (ROOT / package).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (tmp_path / "models" / "other_net.py").write_text("from .blocks import ConvBNAct\n\nWIDTH = 2\n")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert content.count(old) == 1, f"{old!r} must be in {path.name} once"
    path.write_text(content.replace(old, new))


def hashes(repo: Path) -> tuple[str, str]:
    return training_code_hash(repo, "models.yolox"), training_code_hash(repo, "models.other_net")


def test_the_hash_is_stable_and_belongs_to_an_architecture(repo: Path) -> None:
    yolox, other = hashes(repo)
    assert (yolox, other) == hashes(repo)
    assert yolox != other
    assert len(yolox) == 12
    assert training_code_hash(ROOT, "models.yolox") == yolox


def test_comments_docstrings_and_layout_change_nothing(repo: Path) -> None:
    before = hashes(repo)
    for name in ("models/yolox.py", "training/loop.py", "data/augment.py"):
        path = repo / name
        path.write_text('"""Another docstring."""\n' + path.read_text().split('"""', 2)[2] + "\n# a remark\n\n\n")
    edit(repo / "models/yolox.py", "STRIDES = (8, 16, 32)", "STRIDES = (\n    8,\n    16,  # middle\n    32,\n)")
    edit(repo / "training/loop.py", '    """The loss was not finite for too many steps in a row."""', '    """Else."""')
    assert hashes(repo) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data/augment.py", "PAD_GREY = 114", "PAD_GREY = 115"),
        ("training/loop.py", "MAX_NON_FINITE_STEPS = 20", "MAX_NON_FINITE_STEPS = 21"),
        ("training/worker.py", "started = time.monotonic()", "started = time.time()"),
        ("data/sampler.py", "self._epoch = 0", "self._epoch = 1"),
    ],
)
def test_a_changed_line_of_the_loop_or_loader_changes_all(repo: Path, name: str, old: str, new: str) -> None:
    before = hashes(repo)
    edit(repo / name, old, new)
    assert [one != two for one, two in zip(before, hashes(repo), strict=True)] == [True, True]


def test_a_changed_architecture_changes_its_own_hash_alone(repo: Path) -> None:
    yolox, other = hashes(repo)
    edit(repo / "models/yolox.py", "STRIDES = (8, 16, 32)", "STRIDES = (4, 8, 16)")
    changed, unchanged = hashes(repo)
    assert changed != yolox
    assert unchanged == other
    edit(repo / "models/other_net.py", "WIDTH = 2", "WIDTH = 3")
    assert hashes(repo) == (changed, training_code_hash(repo, "models.other_net"))
    assert hashes(repo)[1] != other


@pytest.mark.parametrize("name", ["models/__init__.py", "training/job.py", "training/launch.py", "data/prepare.py"])
def test_code_that_decides_no_result_is_left_out(repo: Path, name: str) -> None:
    before = hashes(repo)
    with (repo / name).open("a") as file:
        file.write("\nADDED = 1\n")
    assert hashes(repo) == before


def test_what_an_architecture_imports_belongs_to_it(repo: Path) -> None:
    before = hashes(repo)
    with (repo / "models" / "heads.py").open("a") as file:
        file.write("\nADDED = 1\n")
    after = hashes(repo)
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    with (repo / "models" / "blocks.py").open("a") as file:
        file.write("\nADDED = 1\n")
    assert all(one != two for one, two in zip(after, hashes(repo), strict=True))

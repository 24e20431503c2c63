from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from training.code import training_code_hash
from training.jobs import code_snapshot

ROOT = Path(__file__).parents[3]


YOLOX, OTHER = "models.yolox", "models.other_net"


def copy_code(target: Path) -> Path:
    """The packages' code, with an architecture more."""
    for package in ("models", "data", "evaluation", "training"):
        for path in (ROOT / package).rglob("*.py"):
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (target / "models" / "other_net.py").write_text("from .blocks import ConvBNAct\n\nWIDTH = 2\n")
    return target


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return copy_code(tmp_path)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of both architectures in an unchanged copy."""
    repo = copy_code(tmp_path_factory.mktemp("unchanged"))
    return {module: training_code_hash(repo, module) for module in (YOLOX, OTHER)}


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert content.count(old) == 1, f"{old!r} must be in {path.name} once"
    path.write_text(content.replace(old, new))


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"\n{line}\n")


def test_the_hash_is_stable_and_belongs_to_an_architecture(before: dict[str, str]) -> None:
    assert training_code_hash(ROOT, YOLOX) == before[YOLOX] != before[OTHER]
    assert all(len(value) == 12 for value in before.values())


def test_comments_docstrings_and_layout_change_nothing(repo: Path, before: dict[str, str]) -> None:
    for name in ("models/yolox.py", "training/loop.py", "data/augment.py"):
        path = repo / name
        path.write_text('"""Another docstring."""\n' + path.read_text().split('"""', 2)[2] + "\n# a remark\n\n\n")
    edit(repo / "models/yolox.py", "STRIDES = (8, 16, 32)", "STRIDES = (\n    8,\n    16,  # middle\n    32,\n)")
    edit(
        repo / "training/errors.py",
        '    """The loss was not finite for too many steps in a row, or weights are not."""',
        '    """Else."""',
    )
    assert training_code_hash(repo, YOLOX) == before[YOLOX]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data/augment.py", "PAD_GREY = 114", "PAD_GREY = 115"),
        ("training/loop.py", "MAX_NON_FINITE_STEPS = 20", "MAX_NON_FINITE_STEPS = 21"),
        ("training/step.py", "total_counts.clamp(min=1)", "total_counts.clamp(min=2)"),
        ("data/sampler.py", "self._epoch = 0", "self._epoch = 1"),
    ],
)
def test_a_changed_line_of_the_loop_or_loader_counts(
    repo: Path, before: dict[str, str], name: str, old: str, new: str
) -> None:
    edit(repo / name, old, new)
    assert training_code_hash(repo, OTHER) != before[OTHER]


def test_a_changed_architecture_changes_its_own_hash_alone(repo: Path, before: dict[str, str]) -> None:
    edit(repo / "models/yolox.py", "STRIDES = (8, 16, 32)", "STRIDES = (4, 8, 16)")
    assert training_code_hash(repo, YOLOX) != before[YOLOX]
    assert training_code_hash(repo, OTHER) == before[OTHER]


def test_what_an_architecture_imports_belongs_to_it(repo: Path, before: dict[str, str]) -> None:
    append(repo / "models/heads.py", "ADDED = 1")
    assert training_code_hash(repo, YOLOX) != before[YOLOX]
    assert training_code_hash(repo, OTHER) == before[OTHER]
    append(repo / "models/blocks.py", "ADDED = 1")
    assert training_code_hash(repo, OTHER) != before[OTHER]


def test_code_that_decides_no_result_is_left_out(repo: Path, before: dict[str, str]) -> None:
    for name in (
        "models/__init__.py",
        "training/job.py",
        "training/launch.py",
        "data/prepare.py",
        "evaluation/coco.py",
    ):
        append(repo / name, "ADDED = 1")
    assert training_code_hash(repo, YOLOX) == before[YOLOX]


def test_workers_get_every_file_that_lies_beside_a_module_and_is_read_by_it() -> None:
    with code_snapshot(ROOT) as folder:
        modules = sorted(folder.rglob("*.py"))
        assert folder / "training" / "worker.py" in modules
        named = [
            (path.parent / name)
            for path in modules
            for name in re.findall(r'Path\(__file__\)\.parent / "([\w.]+\.\w+)"', path.read_text())
        ]
        assert {path.name for path in named} >= {"page.html", "report_page.css"}
        assert [path for path in named if not path.is_file()] == []
        assert not list((folder / "data").glob("processed"))

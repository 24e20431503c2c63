from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tracking.client import connect


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client of a real SQLite store; every test uses names of its own in it."""
    return connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of artifacts with one file at the top and one below."""
    folder = tmp_path / "files"
    (folder / "plots").mkdir(parents=True)
    (folder / "spec.json").write_text("{}")
    (folder / "plots" / "curve.txt").write_text("0 1 2")
    return folder

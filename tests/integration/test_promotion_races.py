"""Two `speck promote` at once, again and again: the better run holds the alias, and the ledger tells of both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyDataset, store
from decided import champion
from finished import finish_run

from data.card import load_card
from flows.settings import Settings
from tracking.authority import open_authority
from tracking.client import connect
from training.spec import DatasetSpec, RunSpec

ROOT = Path(__file__).parents[2]
# A card in the catalogue, for the commands run in processes of their own.
NAME = "sample-aerial"
NUM_RACES = 20
# `speck` with its imports behind it, which waits until the other one is as far: what is left is the decision.
RACER = """
import sys, time
from pathlib import Path
import flows.promote, flows.promote_command, mlflow.tracking
from flows.cli import main
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{name}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.002)
sys.argv[1:3] = []
main()
"""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture
def dataset(tiny: TinyDataset, tmp_path: Path) -> tuple[Path, Path, DatasetSpec]:
    """The tiny pictures by a card of the catalogue: prepared, in a storage, and as a spec has them."""
    card = load_card(NAME)
    folder = tmp_path / "prepared"
    shutil.copytree(tiny.folder, folder)
    for path in (folder / "annotations").glob("*.json"):
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(card.classes)]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"categories": categories}))
    storage = tmp_path / "storage"
    return folder, storage, DatasetSpec(name=NAME, version=store(folder, storage), card=card)


def test_the_better_of_two_promotions_at_once_holds_the_alias(
    dataset: tuple[Path, Path, DatasetSpec],
    tiny_spec: Callable[..., RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, storage, described = dataset
    for name in [name for name in os.environ if name.startswith(("SPECK_", "MLFLOW_", "PREFECT_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPECK_DATA_SOURCE", str(storage))
    monkeypatch.setenv("SPECK_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    empty = tmp_path / "mlflow.db"
    connect(f"sqlite:///{empty}")
    num_overtaken, first_was_better = 0, 0
    for race in range(NUM_RACES):
        home = tmp_path / f"home-{race}"
        home.mkdir()
        shutil.copyfile(empty, home / "mlflow.db")
        monkeypatch.setenv("SPECK_HOME", str(home))
        settings = Settings()
        worse, better = (
            finish_run(
                tiny_spec(seed=seed).model_copy(update={"dataset": described}), folder, settings, share=share, seed=seed
            )
            for seed, share in ((2 * race, 0.4), (2 * race + 1, 1.0))
        )
        order = [worse, better] if race % 2 else [better, worse]
        racing = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, str(home), result.run_key, "promote", NAME, "--run", result.run_key],
                cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for result in order
        ]  # fmt: skip
        printed = [process.communicate(timeout=300)[0] for process in racing]
        entries = open_authority(None, home).entries(NAME)
        told: dict[str, Any] = {entry.run_key: entry.action for entry in entries}
        assert told.keys() == {worse.run_key, better.run_key}, printed
        assert told[better.run_key] == "promoted", printed
        holder = champion(connect(settings.tracking_uri), NAME)
        assert holder is not None
        assert holder.run_key == better.run_key, printed
        assert entries[-1].champion == holder.version
        assert [entry.generation for entry in entries] == [1, 2]
        num_overtaken += sum("Decide again" in text for text in printed)
        first_was_better += entries[0].run_key == better.run_key
    print(f"{NUM_RACES} races: the better one was first in {first_was_better}, somebody overtaken in {num_overtaken}")
    assert num_overtaken > 0, "no two decisions met, so these were no races"

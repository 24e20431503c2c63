"""Packaged detectors, loaded by MLflow in a process that cannot see this repository."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import taught

import models
from data.tiling import TileGrid
from flows.register import inference_of
from flows.settings import REPO
from tracking.client import connect
from tracking.packaging import DigestMismatch, load_verified, package
from tracking.registry import register
from tracking.runs import DatasetRef, ensure_run
from training.checkpoint import save_tensors
from training.scoring import detect_split, split_inputs
from training.spec import ArchitectureSpec, RunSpec, ScoringSpec
from training.state import build_model
from training.workers import Workers

# Laid out as no writer of JSON would: it has to arrive as it is.
OPERATING_POINT = '{"overall":  null,\n "per_class": {"Fußgänger": null}}\n'
# Removes what an editable install adds, then proves that nothing of ours is left to import.
ISOLATED = """
import importlib.util, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if entry not in ("", sys.argv[2])]
assert not [name for name in ("models", "data", "tracking", "training") if importlib.util.find_spec(name)]
import mlflow.pyfunc, pandas, torch
torch.set_num_threads(1)
with open(sys.argv[1]) as file:
    order = json.load(file)
pictures = pandas.DataFrame({"image": [open(path, "rb").read() for path in order["pictures"]]})
found = {name: mlflow.pyfunc.load_model(folder).predict(pictures) for name, folder in order["models"].items()}
print(json.dumps(found))
"""


def scoring(**rules: Any) -> dict[str, Any]:
    return {"scoring": ScoringSpec(score_threshold=0, max_detections=20, **rules)}


# By name: what a spec of the tests is changed by.
CASES: dict[str, dict[str, Any]] = {
    "whole pictures": scoring(),
    "larger input": scoring(input_size_px=96),
    "tiles": scoring(tiling=TileGrid(size_px=40, overlap_px=12)),
    "mirror images": scoring(flip=True),
    "mirrored tiles in bf16": scoring(tiling=TileGrid(size_px=40, overlap_px=12), flip=True) | {"precision": "bf16"},
    **{name: scoring() | {"architecture": name} for name in ("csf-net-n", "gf-fpn-n", "foreground-probe-n")},
}


@pytest.fixture(scope="module")
def specs(tiny_spec: Callable[..., RunSpec]) -> dict[str, RunSpec]:
    made = {}
    for name, changes in CASES.items():
        rules = dict(changes)
        architecture = rules.pop("architecture", None)
        spec = tiny_spec(**rules)
        if architecture is not None:
            spec = spec.model_copy(update={"architecture": ArchitectureSpec(name=architecture, settings={})})
        made[name] = spec
    return made


@pytest.fixture(scope="module")
def detectors(specs: dict[str, RunSpec]) -> dict[str, Any]:
    """One of each architecture, whose scores are far enough apart that rounding does not decide their order."""
    torch.set_num_threads(1)
    made = {spec.architecture.name: spec for spec in specs.values()}
    by_architecture = {name: taught(build_model(spec)) for name, spec in made.items()}
    return {name: by_architecture[spec.architecture.name] for name, spec in specs.items()}


@pytest.fixture(scope="module")
def packages(
    specs: dict[str, RunSpec], detectors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packages")
    made = {}
    for number, (name, spec) in enumerate(specs.items()):
        weights = root / f"{number}.safetensors"
        save_tensors(weights, detectors[name].state_dict())
        made[name] = package(
            weights,
            spec.model_dump_json(),
            OPERATING_POINT,
            REPO / "models",
            REPO / "evaluation" / "tile_merging.py",
            root / str(number),
            architecture=spec.architecture.name,
            settings=spec.architecture.settings,
            class_names=spec.dataset.card.classes,
            inference=inference_of(spec),
            card="# A card",
        )
    return made


@pytest.fixture
def packaged(packages: dict[str, Path]) -> Path:
    return packages["whole pictures"]


@pytest.fixture(scope="module")
def served(packages: dict[str, Path], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each package finds on the pictures of val, in their order, without this repository."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    images = json.loads((tiny.folder / "annotations" / "val.json").read_text())["images"]
    order = {
        "pictures": [str(tiny.folder / "images" / image["file_name"]) for image in images],
        "models": {name: str(folder) for name, folder in packages.items()},
    }
    (elsewhere / "order.json").write_text(json.dumps(order))
    command = [sys.executable, "-c", ISOLATED, elsewhere / "order.json", REPO]
    output = subprocess.run(command, cwd=elsewhere, check=True, capture_output=True, text=True, timeout=300).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_package_detects_without_the_repository_what_evaluation_detects(
    case: str, specs: dict[str, RunSpec], detectors: dict[str, Any], served: dict[str, Any], tiny: Any
) -> None:
    spec = specs[case]
    inputs = split_inputs(spec, tiny.folder, "val")
    evaluated = detect_split(spec, detectors[case], inputs, Workers(0, 1, torch.device("cpu")))
    assert evaluated is not None
    ids = [image["id"] for image in json.loads((tiny.folder / "annotations" / "val.json").read_text())["images"]]
    flat = [
        (image_id, one["label"] + 1, one["bbox_xyxy_px"], one["score"])
        for image_id, found in zip(ids, served[case], strict=True)
        for one in found
    ]
    assert len(flat) == len(evaluated.detections) > 8
    for (image_id, category_id, (x1, y1, x2, y2), score), expected in zip(flat, evaluated.detections, strict=True):
        assert (image_id, category_id) == (expected["image_id"], expected["category_id"])
        assert [x1, y1, x2 - x1, y2 - y1] == pytest.approx(expected["bbox"], abs=1e-3)
        assert score == pytest.approx(expected["score"], abs=1e-4)


def test_tiles_and_mirror_images_are_seen(served: dict[str, Any]) -> None:
    assert len({json.dumps(served[case]) for case in CASES}) == len(CASES)
    names = {one["class_name"] for found in served["tiles"] for one in found}
    assert names
    assert names <= {"bright", "dark"}


def test_the_folder_holds_no_pickle_and_the_package_verbatim(packaged: Path) -> None:
    files = [path for path in packaged.rglob("*") if path.is_file()]
    assert not [path.name for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".pyc")]
    for source in [*Path(models.__file__).parent.glob("*.py"), REPO / "evaluation" / "tile_merging.py"]:
        (copy,) = packaged.glob(f"artifacts/speck_models_*/{source.name}")
        assert copy.read_bytes() == source.read_bytes()
    assert (packaged / "artifacts" / "operating_point.json").read_bytes() == OPERATING_POINT.encode()
    assert (packaged / "model_card.md").read_text() == "# A card"
    assert not [line for line in (packaged / "requirements.txt").read_text().split() if "==" not in line or "+" in line]


def test_a_changed_file_is_noticed_before_its_code_runs(packaged: Path, tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    dataset = DatasetRef("dots", "0" * 32 + ".dir", "/srv/dots", {"test": 3})
    run_id = ensure_run(
        client, experiment="dots", run_key="aaa", training_id="aaa", name="x", params={}, tags={}, dataset=dataset,
        start_time_ms=1,
    )  # fmt: skip
    version = register(
        client, model_name="dots", run_id=run_id, run_key="aaa", model_folder=packaged, tags={}, scores={}
    )
    stored = Path(client.get_model_version("dots", str(version)).source.removeprefix("file://"))
    (stored / "__pycache__").mkdir()
    (stored / "__pycache__" / "predictor.cpython-311.pyc").write_bytes(b"left by loading the model in place")
    assert load_verified(client, "dots", version).metadata.signature is not None
    # As the README does, whereupon MLflow writes into a folder of this machine.
    loading = "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); mlflow.pyfunc.load_model('models:/dots/1')"
    subprocess.run([sys.executable, "-c", loading, client.tracking_uri], check=True)
    assert (stored / "registered_model_meta").is_file()
    assert load_verified(client, "dots", version).metadata.signature is not None
    witness = tmp_path / "ran"
    with (stored / "predictor.py").open("a") as file:
        file.write(f"\nopen({str(witness)!r}, 'w')\n")
    with pytest.raises(DigestMismatch, match="dots version 1"):
        load_verified(client, "dots", version)
    assert not witness.exists()

"""A trained detector as an MLflow model folder that loads without this repository, and its digest."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.client import prepare_environment, speaks_to_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.pyfunc import PyFuncModel

DIGEST = "speck.digest"
CARD = "model_card.md"
REQUIREMENTS = ("mlflow", "numpy", "opencv-python-headless", "pandas", "safetensors", "torch")
PREDICTOR = Path(__file__).parent / "predictor.py"
REGISTRATION = "\n\nfrom mlflow.models import set_model  # noqa: E402\n\nset_model(Predictor())\n"


class DigestMismatch(RuntimeError):
    """A registered model's files are not the ones that were registered: they must not be loaded."""


@dataclass(frozen=True)
class Inference:
    """How evaluation made the detections that the model's score counts; a packaged model makes them the same way.

    `precision` is fp32 or bf16; `tiling`, with `size_px` and `overlap_px`, the tiles that pictures are looked at by;
    `flip`: their mirror images are looked at as well; `postprocess` are the arguments of
    `models.interface.PostprocessConfig`.
    """

    input_size_px: int
    precision: str
    tiling: Mapping[str, int] | None
    flip: bool
    postprocess: Mapping[str, float]


def package(
    weights: Path,
    spec_json: str,
    operating_point_json: str,
    models_folder: Path,
    tile_merging: Path,
    out: Path,
    *,
    architecture: str,
    settings: Mapping[str, Any],
    class_names: Sequence[str],
    inference: Inference,
    card: str,
) -> Path:
    """Writes an MLflow pyfunc model to the new folder `out` and returns it.

    `weights` is a safetensors file of the detector's state; `settings` are the keyword arguments of `models.build`;
    `operating_point_json` tells users from which score to take a detection seriously; `card` is Markdown for people.
    No pickle is written. The copy of `models_folder`, in which the file `tile_merging` finds a place, is named by its
    content, so that two versions loaded in one process cannot see each other's code.

    Raises FileExistsError when `out` exists.
    """
    prepare_environment()
    import mlflow.pyfunc

    if out.exists():
        raise FileExistsError(f"{str(out)!r}: a model is packaged into a new folder. Remove it or choose another")
    config = {
        "architecture": architecture,
        "settings": dict(settings),
        "class_names": list(class_names),
        **asdict(inference),
    }
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        models = staging / "models"
        shutil.copytree(models_folder, models, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(tile_merging, models / "tile_merging.py")
        models = models.rename(staging / f"speck_models_{digest(models)[:8]}")
        shutil.copy(weights, staging / "weights.safetensors")
        (staging / "spec.json").write_text(spec_json, encoding="utf-8")
        (staging / "operating_point.json").write_text(operating_point_json, encoding="utf-8")
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        (staging / "predictor.py").write_text(PREDICTOR.read_text(encoding="utf-8") + REGISTRATION, encoding="utf-8")
        mlflow.pyfunc.save_model(
            path=str(out),
            python_model=str(staging / "predictor.py"),
            artifacts={
                "weights": str(staging / "weights.safetensors"),
                "spec": str(staging / "spec.json"),
                "operating_point": str(staging / "operating_point.json"),
                "config": str(staging / "config.json"),
                "models": str(models),
            },
            signature=_signature(),
            input_example=_example(inference.input_size_px),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    (out / CARD).write_text(card, encoding="utf-8")
    return out


def digest(folder: Path) -> str:
    """sha256 over the relative path and content of every file under `folder`, in order of path."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{content} {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


def load_verified(client: MlflowClient, model_name: str, version: int) -> PyFuncModel:
    """The model of a registered version, loaded from a private copy whose digest was checked first.

    Raises DigestMismatch, before any of its code runs, when the files differ from the registered digest.
    """
    import mlflow.pyfunc

    temporary = tempfile.TemporaryDirectory(prefix="speck-model-")
    try:
        folder = download_verified(client, model_name, version, Path(temporary.name))
    except DigestMismatch:
        temporary.cleanup()
        raise
    model = mlflow.pyfunc.load_model(str(folder))
    weakref.finalize(model, temporary.cleanup)
    return model


@speaks_to_store
def download_verified(client: MlflowClient, model_name: str, version: int, into: Path) -> Path:
    """Fetch the packaged folder of a registered version into the folder `into`, and return where it lies there.

    `artifacts/weights.safetensors` and `artifacts/spec.json` are the weights and the spec of the run.

    Raises DigestMismatch when the files differ from the registered digest.
    """
    import mlflow.artifacts
    from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME

    registered = client.get_model_version(model_name, str(version))
    folder = Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=registered.source, dst_path=str(into), tracking_uri=client.tracking_uri
        )
    )
    # Left behind where somebody loaded the model in place; Python would run it instead of the source.
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    # MLflow's own, written into a local folder by whoever loads from it by the model's name; nothing of it is read.
    (folder / REGISTERED_MODEL_META_FILE_NAME).unlink(missing_ok=True)
    found, expected = digest(folder), registered.tags.get(DIGEST, "")
    if found != expected:
        raise DigestMismatch(
            f"{model_name} version {version}: its files have digest {found[:12]}..., registered was "
            f"{expected[:12] or 'none'}...: they were changed after registration. Do not load them: roll back"
        )
    return folder


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array, Object, Property

    detection = Object(
        [
            Property("bbox_xyxy_px", Array(DataType.double)),
            Property("score", DataType.double),
            Property("label", DataType.long),
            Property("class_name", DataType.string),
        ]
    )
    return ModelSignature(Schema([ColSpec(AnyType(), "image")]), Schema([ColSpec(Array(detection))]))


def _example(input_size_px: int) -> Any:
    import cv2
    import numpy as np
    import pandas as pd

    _, encoded = cv2.imencode(".png", np.full((input_size_px, input_size_px, 3), 114, np.uint8))
    return pd.DataFrame({"image": [base64.b64encode(encoded.tobytes()).decode()]})

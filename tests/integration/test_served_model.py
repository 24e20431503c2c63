"""A registered model behind `mlflow models serve`, and in an environment of its own: what it answers, and to what."""

from __future__ import annotations

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch

from flows.register import inference_of
from flows.settings import REPO
from infra.servers import free_port
from tracking.client import connect
from tracking.packaging import package
from tracking.registry import CHAMPION, move_alias, register
from tracking.runs import DatasetRef, ensure_run
from training.checkpoint import save_tensors
from training.spec import RunSpec, ScoringSpec
from training.state import build_model

STARTS_S = 300.0
CLASSES = {"bright", "dark"}


class Registered(NamedTuple):
    """The store, and the packaged folder that was registered in it as champion of `tiny-squares`."""

    tracking_uri: str
    folder: Path


@pytest.fixture(scope="module")
def registered(tiny_spec: Callable[..., RunSpec], tmp_path_factory: pytest.TempPathFactory) -> Registered:
    root = tmp_path_factory.mktemp("registry")
    spec = tiny_spec(scoring=ScoringSpec(score_threshold=0, max_detections=20))
    torch.manual_seed(0)
    save_tensors(root / "weights.safetensors", build_model(spec).state_dict())
    folder = package(
        root / "weights.safetensors",
        spec.model_dump_json(),
        "null",
        REPO / "models",
        REPO / "evaluation" / "tile_merging.py",
        root / "model",
        architecture=spec.architecture.name,
        settings=spec.architecture.settings,
        class_names=spec.dataset.card.classes,
        inference=inference_of(spec),
        card="# A card",
    )
    uri = f"sqlite:///{root}/mlflow.db"
    client = connect(uri)
    run_id = ensure_run(
        client, experiment="tiny-squares", run_key="aaa", training_id="aaa", name="x", params={}, tags={},
        dataset=DatasetRef("tiny-squares", "0" * 32 + ".dir", "", {"test": 3}), start_time_ms=1,
    )  # fmt: skip
    number = register(
        client, model_name="tiny-squares", run_id=run_id, run_key="aaa", model_folder=folder, tags={}, scores={}
    )
    move_alias(client, "tiny-squares", CHAMPION, number)
    return Registered(uri, folder)


@pytest.fixture(scope="module")
def server(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the champion, as the manual says to serve it."""
    elsewhere, port = tmp_path_factory.mktemp("serving"), free_port(0)
    command = [
        str(Path(sys.executable).with_name("mlflow")), "models", "serve",
        "--model-uri", "models:/tiny-squares@champion", "--env-manager", "local", "--port", str(port),
    ]  # fmt: skip
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registered.tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # It starts uvicorn by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    url = f"http://127.0.0.1:{port}"
    with (elsewhere / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=elsewhere, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + STARTS_S
        while not _answers(f"{url}/ping"):
            assert process.poll() is None, (elsewhere / "log").read_text()
            assert time.monotonic() < until, (elsewhere / "log").read_text()
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(server: str, body: Any, content_type: str = "application/json") -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server}/invocations", data=content, headers={"Content-Type": content_type}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def jpeg(height_px: int, width_px: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def test_a_jpeg_is_answered_with_detections_in_its_pixels(server: str) -> None:
    pictures = [base64.b64encode(jpeg(*size)).decode() for size in ((64, 64), (90, 300))]
    status, text = ask(server, {"dataframe_records": [{"image": picture} for picture in pictures]})
    assert status == 200, text
    small, wide = json.loads(text)["predictions"]
    assert min(len(small), len(wide)) > 0
    assert all({*one} == {"bbox_xyxy_px", "score", "label", "class_name"} for one in [*small, *wide])
    boxes_xyxy_px = np.array([one["bbox_xyxy_px"] for one in wide])
    assert (boxes_xyxy_px >= 0).all()
    assert (boxes_xyxy_px <= [300, 90, 300, 90]).all()
    assert boxes_xyxy_px[:, 2].max() > 64, "not in the network's input"
    assert {one["class_name"] for one in wide} <= CLASSES
    assert ask(server, {"dataframe_split": {"columns": ["image"], "data": [[pictures[0]]]}})[0] == 200


def png(height_px: int, width_px: int) -> bytes:
    """A PNG that promises so many pixels and holds none."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"")}
    parts = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = base64.b64encode(png(20_000, 20_000)).decode()
BAD = {
    "not base64": ({"dataframe_records": [{"image": "not base64!"}]}, "row 0: 'image' is not base64"),
    "no image": ({"dataframe_records": [{"image": "bm90IGFuIGltYWdl"}]}, "row 0: 'image' is no JPEG or PNG (12 bytes)"),
    "half an image": (
        {"dataframe_records": [{"image": base64.b64encode(jpeg(64, 64)[:40]).decode()}]}, "are not a readable JPEG",
    ),
    "empty text": ({"dataframe_records": [{"image": ""}]}, "row 0: 'image' is no JPEG or PNG (0 bytes)"),
    "null": ({"dataframe_records": [{"image": None}]}, "image"),
    "a number": ({"dataframe_records": [{"image": 7}]}, "row 0: 'image' must be"),
    "a list": ({"dataframe_records": [{"image": [1, 2]}]}, "row 0: 'image' must be"),
    "another column": ({"dataframe_records": [{"picture": "aaaa"}]}, "image"),
    "no row": ({"dataframe_records": []}, "image"),
    "too large": ({"dataframe_records": [{"image": BOMB}]}, "row 0: the image has more than 134217728 pixels"),
    "no such form": ({"pictures": []}, "inputs"),
    "no JSON": (b"{", "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_request_is_refused_with_a_sentence(server: str, fault: str) -> None:
    body, told = BAD[fault]
    status, text = ask(server, body)
    assert (status, "Traceback" in text) == (400, False), text
    assert told in text
    good = {"image": base64.b64encode(jpeg(64, 64)).decode()}
    assert ask(server, {"dataframe_records": [good]})[0] == 200, "it still serves"


def test_another_content_type_is_refused(server: str) -> None:
    assert ask(server, jpeg(64, 64), "image/jpeg")[0] == 415


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_an_environment_with_only_the_declared_requirements_is_enough(registered: Registered, tmp_path: Path) -> None:
    folder, python = tmp_path / "venv", tmp_path / "venv" / "bin" / "python"
    venv.create(folder, with_pip=True)
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--requirement",
        str(registered.folder / "requirements.txt"),
    ]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the requirements cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    (tmp_path / "picture.jpg").write_bytes(jpeg(90, 300))
    script = """
import importlib.util, json, sys
assert not [name for name in ("models", "data", "tracking", "training") if importlib.util.find_spec(name)]
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(pandas.DataFrame({"image": [open("picture.jpg", "rb").read()]}))))
"""
    command = [str(python), "-I", "-c", script, str(registered.folder)]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (found,) = json.loads(output.splitlines()[-1])
    assert len(found) > 0
    here = subprocess.run(
        [sys.executable, "-c", script.replace("assert not", "0 and"), str(registered.folder)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (expected,) = json.loads(here.splitlines()[-1])
    for one, other in zip(found, expected, strict=True):
        assert one["class_name"] == other["class_name"]
        assert [*one["bbox_xyxy_px"], one["score"]] == pytest.approx([*other["bbox_xyxy_px"], other["score"]], abs=1e-4)

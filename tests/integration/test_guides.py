"""Every command of the guides, one after the other, in a copy of the checkout, as a new user types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from chaos.processes import MARK, left_after, new_mark
from services.checkout import copy_checkout

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
# Ends when its user says so, and has to be up by then.
PAGES = "make ui"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the checkout with this environment as its `.venv`; not below a test's folder, see `services.stack`."""
    folder = Path(tempfile.mkdtemp(prefix="speck-guide-"))
    folder.chmod(0o711)
    repo = folder / "repo"
    copy_checkout(repo)
    (repo / ".venv").symlink_to(sys.prefix)
    # Older than the environment's stamp, or make would install the copy into it.
    for name in ("pyproject.toml", "requirements.lock"):
        os.utime(repo / name, (0, 0))
    yield repo
    shutil.rmtree(folder, ignore_errors=True)


def scripts(text: str) -> list[str]:
    """The `sh` blocks, each with its comments."""
    return re.findall(r"```sh\n(.*?)```", text, re.S)


def test_a_guide_is_what_works(checkout: Path, guide: Path) -> None:
    mark = new_mark()
    foreign = ("SPECK_", "MLFLOW_", "PREFECT_", "RAY_", "AWS_", "DVC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {
        MARK: mark,
        "PYTHONPATH": f"{checkout}:{checkout}/tests",
        "SPECK_STORE": str(checkout.parent / "store"),
    }
    environment |= {
        f"GIT_{who}_{what}": "tests@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    site = write_site(checkout.parent / "site")
    script = "\n".join(scripts(guide.read_text()))
    script = script.replace("/data/my-site", str(site)).replace("/data/remote", str(checkout.parent / "remote"))
    script = script.replace(PAGES, f"{sys.executable} {__file__} {PAGES}").replace("SEED_1_KEY", '"$(last_key)"')
    helper = (
        'last_key() { python -c \'import json, pathlib; print(max(pathlib.Path(".speck/runs").glob("*/result.json"), '
        "key=lambda path: path.stat().st_mtime).parent.name)'; }\n"
    )
    typed = f"set -euo pipefail\n{helper}PS4='+ $(date +%T) '\nset -x"
    try:
        done = subprocess.run(
            ["bash", "-c", f"{typed}\n{script}"], cwd=checkout, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1700, check=False,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-6000:]
    finally:
        subprocess.run([sys.executable, "-m", "flows", "down"], cwd=checkout, env=environment, check=False)
    assert left_after(mark, 20) == []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("guide", GUIDES, ids=[path.stem for path in GUIDES])


def write_site(folder: Path) -> Path:
    """Forty pictures with bright squares, and their COCO file."""
    dice = np.random.default_rng(0)
    images, annotations = [], []
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    for number in range(1, 41):
        picture = dice.integers(0, 60, (96, 96, 3), np.uint8)
        for x, y in dice.integers(0, 84, (3, 2)).tolist():
            picture[y : y + 9, x : x + 9] = dice.integers(180, 255)
            box = {"image_id": number, "category_id": 1, "bbox": [x, y, 9, 9], "area": 81, "iscrowd": 0}
            annotations.append(box | {"id": len(annotations) + 1})
        cv2.imwrite(str(folder / f"images/{number}.png"), picture)
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 96})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (folder / "annotations/instances.json").write_text(json.dumps(document))
    return folder


def until_up(command: list[str]) -> int:
    """Starts a command, stops it by Ctrl-C once it has told how, and returns how it ended: 0 where by that."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    stopper = threading.Timer(120, process.kill)
    stopper.daemon = True
    stopper.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        if "Ctrl-C" in line:
            os.killpg(process.pid, signal.SIGINT)
    ended = process.wait()
    # Which of both make itself gives, its version says.
    return 0 if ended in (-signal.SIGINT, 128 + signal.SIGINT) else ended


if __name__ == "__main__":
    sys.exit(until_up(sys.argv[1:]))

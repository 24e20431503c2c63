"""Every parser over mutated valid files: never an exception, 5 s for a file, or 300 MB more than it takes to start.

The seconds are the processor's, as others may use it too; a hang without work ends with the process.

`make soak` runs it for SPECK_FUZZ_S seconds over all parsers together, 600 if that is not set; what fails is kept.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from PIL import Image

from data.archives import unpack
from data.coco import write_split
from data.importing import ImportRefused
from data.reading import READERS, read_labels
from data.records import SPLITS
from data.splits import SplitRule

MAX_FILE_S = 5
MAX_BYTES = 300 * 10**6
PARSERS = (*READERS, "zip", "tar", "tgz")
VISDRONE = "3,4,10,8,1,4,0,0\n20,10,5,5,1,1,0,1,\n0,0,9,9,0,0,0,0\n"
UAVDT = "1,1,3,4,10,8,1,1,1\n1,2,20,10,5,5,1,1,3\n"
VOC = (
    "<annotation><filename>a.png</filename><size><width>32</width><height>24</height></size>\n"
    "<object><name>car</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>9</xmax><ymax>12</ymax>"
    "</bndbox></object></annotation>\n"
)
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 32, "height": 24, "ignore_regions_xywh": [[0, 0, 5, 5]]}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 4, 6, 8], "area": 48, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [5.5, 4, 6, 8], "ignore": 1},
    ],
    "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "boat"}],
}
DATA_YAML = "names: {0: car, 1: boat}\nnc: 2\ntrain: train.txt\nval: images/val.png\ntest: [images/test.png]\n"
FILES: dict[str, dict[str, str]] = {
    "coco": {f"annotations/{split}.json": json.dumps(COCO).replace("a.png", f"{split}.png") for split in SPLITS},
    "voc": {f"annotations/{split}.xml": VOC for split in SPLITS} | {f"splits/{split}.txt": split for split in SPLITS},
    "yolo": {f"labels/{split}.txt": "0 0.5 0.5 0.2 0.2\n1 .3 .3 .1 .1\n" for split in SPLITS}
    | {"data.yaml": DATA_YAML, "train.txt": "./images/train.png\n"},
    "visdrone": {f"{split}/annotations/{split}.txt": VISDRONE for split in SPLITS},
    "uavdt": {f"GT/M010{n}_gt_whole.txt": UAVDT for n in range(3)}
    | {"GT/M0100_gt_ignore.txt": "1,1,4,2,3,3,1,-1,-1\n"},
}
PICTURES = {
    "coco": [f"images/{split}.png" for split in SPLITS],
    "voc": [f"images/{split}.png" for split in SPLITS],
    "yolo": [f"images/{split}.png" for split in SPLITS],
    "visdrone": [f"{split}/images/{split}.png" for split in SPLITS],
    "uavdt": [f"M010{n}/img000001.png" for n in range(3)],
}
CLASSES = {"visdrone": ("pedestrian", "car"), "uavdt": ("car", "truck", "bus")}
# What parsers stumble over, as bytes and as JSON values.
TOKENS = [
    b"nan", b"-inf", b"1e400", b"9" * 400, b"9" * 5000, b"-1", b"0", b"1_0", b"0x1", b"1" + b"0" * 300, b"2020-99-99",
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\x0b", b"\xed\xa0\x80", "\u0661\u2028".encode(), b"\\ud800", b"x" * 300,
    b"../", b"/", b"\\", b"%00", b'"', b"'", b",", b",,,,", b" ", b"\n\n", b"null", b"true", b"PK\x05\x06",
    b"[" * 3000, b"{" * 300, b"&a ", b"*a", b"!!python/name:os.system ", b"- " * 500, b"? " * 200, b": ", b"<<: ",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<a>" * 3000, b"<![CDATA[", b"</object>",
]  # fmt: skip
VALUES: list[object] = [
    None, True, -1, 0, 2**63, 10**400, 1e300, -1e-300, "", "../x", "/etc/passwd", "a\\b", "\ud800", "\x00", "x" * 5000,
    [], {}, [[]], [1, 2, 3], [1, 2, 3, "4"], [0, 0, 10**400, 1], {"a": {}}, "NaN", 0.5,
]  # fmt: skip


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def build(parser: str, folder: Path) -> list[Path]:
    """Write a valid folder and return the files to mutate."""
    for name in PICTURES[parser]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24)).save(folder / name)
    for name, text in FILES[parser].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [folder / name for name in (*FILES[parser], PICTURES[parser][0])]


def mutate(data: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.choice((1, 1, 2, 5))):
        start = dice.randrange(len(data) + 1)
        end = min(len(data), start + dice.choice((1, 3, 20, 400)))
        kind = dice.randrange(6)
        if kind == 0:
            data = data[:start] + dice.choice(TOKENS) + data[start:]
        elif kind == 1:
            data = data[:start] + dice.choice(TOKENS) + data[end:]
        elif kind == 2:
            data = data[:start] + data[end:]
        elif kind == 3:
            data = data[:start] + bytes(byte ^ 1 << dice.randrange(8) for byte in data[start:end]) + data[end:]
        elif kind == 4:
            data = data[:start]
        else:
            data = (
                data[:start]
                + data[start:end] * min(dice.choice((2, 50, 5000)), 10**6 // (end - start + 1))
                + data[end:]
            )
    return data


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    """Put a strange value at a place of the tree."""
    document = json.loads(data)
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else [*range(len(node))]
        key = dice.choice(keys)
        if not isinstance(node[key], (dict, list)) or not node[key] or dice.random() < 0.2:
            node[key] = nested(dice.randrange(990)) if dice.random() < 0.1 else dice.choice(VALUES)
            return json.dumps(document).encode()
        node = node[key]


def read(parser: str, folder: Path, rule: SplitRule | None, out: Path) -> None:
    """All that an import reads; whatever is without errors must also be possible to write."""
    reader = READERS[parser]
    reader.recognise(folder)
    classes = CLASSES.get(parser, ("car", "boat"))
    with suppress(ImportRefused):
        classes = reader.class_names(folder) or classes
    labels = read_labels(parser, folder, classes, rule)
    problems = labels.problems + labels.divider.problems
    for problem in problems:
        str(problem).encode("utf-8", "backslashreplace")
    if all(problem.severity == "warning" for problem in problems):
        for split, content in labels.splits.items():
            write_split(out / f"{split}.json", content, classes, {})


def run_reader(parser: str, folder: Path) -> Callable[[random.Random], list[Path]]:
    files = build(parser, folder / "source")
    originals = {path: path.read_bytes() for path in files}

    def step(dice: random.Random) -> list[Path]:
        path = dice.choice(files)
        is_json = path.suffix == ".json" and dice.random() < 0.6
        path.write_bytes((mutate_json if is_json else mutate)(originals[path], dice))
        rule = dice.choice((None, SplitRule(), SplitRule(rule="ratio"), SplitRule(rule="by-sequence", sequence=".")))
        read(parser, folder / "source", rule, folder)
        path.write_bytes(originals[path])
        return [path]

    return step


def run_archive(kind: str, folder: Path) -> Callable[[random.Random], list[Path]]:
    build("yolo", folder / "source")
    archive, target = folder / f"a.{kind}", folder / "target"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
            for path in sorted((folder / "source").rglob("*")):
                content.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz" if kind == "tgz" else "w") as tar:
            tar.add(folder / "source", "source")
    original = archive.read_bytes()

    def step(dice: random.Random) -> list[Path]:
        archive.write_bytes(mutate(original, dice))
        with suppress(ImportRefused):
            unpack(archive, target)
        shutil.rmtree(target)
        return [archive]

    return step


def fuzz(parser: str, folder: Path, seconds: float, seed: int) -> int:
    """Return how many mutated files were read; the first that fails stays in `folder`, and its error is raised."""

    def too_slow(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{parser}: a file took more than {MAX_FILE_S} s")

    folder.mkdir(parents=True)
    step = (run_reader if parser in READERS else run_archive)(parser, folder)
    step(random.Random(seed))
    dice, number = random.Random(seed), 0
    first_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    previous = signal.signal(signal.SIGPROF, too_slow)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            signal.setitimer(signal.ITIMER_PROF, MAX_FILE_S)
            step(dice)
            signal.setitimer(signal.ITIMER_PROF, 0)
            number += 1
            used_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - first_bytes
            if used_bytes > MAX_BYTES:
                raise MemoryError(f"{parser}: {used_bytes} bytes")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    return number


@pytest.mark.parametrize("parser", PARSERS)
def test_a_moment(parser: str, tmp_path: Path) -> None:
    assert fuzz(parser, tmp_path / "fuzz", 0.4, seed=1) > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("parser", PARSERS)
def test_minutes(parser: str, tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else fills."""
    seconds = float(os.environ.get("SPECK_FUZZ_S", "600")) / len(PARSERS)
    seed = random.SystemRandom().randrange(10**9)
    command = [sys.executable, __file__, parser, str(tmp_path / "fuzz"), str(seconds), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds + 120, check=False
    )
    print(parser, seed, result.stdout)
    assert result.returncode == 0, f"seed {seed}, files in {tmp_path}:\n{result.stderr}"


if __name__ == "__main__":
    print(fuzz(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))

"""Checkpoints that can be trusted: safetensors and JSON, and a manifest of hashes written last.

A flipped byte or a missing file is found before anything is loaded; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

MANIFEST = "manifest.json"
NUM_CHECKPOINTS_KEPT = 2


class CorruptCheckpoint(ValueError):
    """A checkpoint folder whose files are missing or differ from its manifest."""


class Manifest(BaseModel):
    """What a complete checkpoint holds: `sha256` by file name, and where in training it was taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_key: str
    step: int
    epoch: int
    sha256: dict[str, str]


def save_checkpoint(
    folder: Path,
    *,
    run_key: str,
    step: int,
    epoch: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Manifest:
    """Write `<group>.safetensors` for each group of tensors, `state.json`, and the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    for group, content in tensors.items():
        save_tensors(folder / f"{group}.safetensors", content)
    write_json(folder / "state.json", state)
    hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(run_key=run_key, step=step, epoch=epoch, sha256=hashes)
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, each tensor on the CPU in plain memory order."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def verify_checkpoint(folder: Path) -> Manifest:
    """The manifest, after every file was hashed.

    Raises:
        CorruptCheckpoint: no readable manifest, a file is missing, or its bytes have changed.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{folder.name}: no complete {MANIFEST}: the checkpoint was cut off; skip it"
        ) from error
    for name, expected in manifest.sha256.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{folder.name}/{name} is listed in the manifest but missing; skip this checkpoint")
        if file_sha256(path) != expected:
            raise CorruptCheckpoint(
                f"{folder.name}/{name} differs from its sha256 in the manifest; skip this checkpoint"
            )
    return manifest


def load_checkpoint(folder: Path, groups: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state. Call `verify_checkpoint` first."""
    from safetensors.torch import load_file

    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return {group: load_file(folder / f"{group}.safetensors") for group in groups}, state


def newest_first(run_folder: Path) -> Iterator[Path]:
    """Checkpoint folders under a run, the furthest step first; those without a readable manifest come last."""
    folders = (path for path in run_folder.glob("checkpoint_*") if path.is_dir())
    yield from sorted(folders, key=lambda folder: (_step(folder), folder.name), reverse=True)


def _step(folder: Path) -> int:
    # Not by name: Ray's names hold the local time, which another node or the end of summer time sets back.
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes()).step
    except (OSError, ValueError):
        return -1


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part.

    Raises:
        ValueError: `value` holds NaN or an infinity.
    """
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

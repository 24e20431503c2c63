"""Checkpoints that can be trusted: safetensors and JSON, and a manifest of hashes written last.

A flipped byte or a missing file is found before anything is loaded; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data.whole_file import write_whole
from training.store import MANIFEST, RunStore, StorageDamaged

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = "checkpoints"


class CorruptCheckpoint(ValueError):
    """A checkpoint folder whose files are missing or differ from its manifest."""


class Manifest(BaseModel):
    """What a complete checkpoint holds: `sha256` by file name, and where in training it was taken.

    `score`: val coco/AP of its weight average, where that was looked at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_key: str
    step: int
    epoch: int
    score: float | None = Field(None, exclude_if=lambda score: score is None)
    sha256: dict[str, str]


def save_checkpoint(
    folder: Path,
    *,
    run_key: str,
    step: int,
    epoch: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    score: float | None = None,
) -> Manifest:
    """Write `<group>.safetensors` for each group of tensors, `state.json`, and the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    for group, content in tensors.items():
        save_tensors(folder / f"{group}.safetensors", content)
    write_json(folder / "state.json", state)
    hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(run_key=run_key, step=step, epoch=epoch, score=score, sha256=hashes)
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, each tensor on the CPU in plain memory order. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:
        # Of what the system said there is only the text.
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def verify_checkpoint(folder: Path, run_key: str | None = None) -> Manifest:
    """The manifest, after every file was hashed.

    Raises:
        CorruptCheckpoint: see `read_manifest`; or a file is missing, or its bytes have changed.
    """
    manifest = read_manifest(folder, run_key)
    for name, expected in manifest.sha256.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{folder.name}/{name} is listed in the manifest but missing; skip this checkpoint")
        if file_sha256(path) != expected:
            raise CorruptCheckpoint(
                f"{folder.name}/{name} differs from its sha256 in the manifest; skip this checkpoint"
            )
    return manifest


def read_manifest(folder: Path, run_key: str | None = None) -> Manifest:
    """What a checkpoint says that it is.

    Raises:
        CorruptCheckpoint: there is no readable manifest, or it is another run's than `run_key`, if that is given.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{folder.name}: no complete {MANIFEST}: the checkpoint was cut off; skip it"
        ) from error
    _require_own(folder.name, manifest, run_key)
    return manifest


def load_checkpoint(folder: Path, groups: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state. Call `verify_checkpoint` first."""
    from safetensors.torch import load_file

    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return {group: load_file(folder / f"{group}.safetensors") for group in groups}, state


def newest_first(run_folder: Path) -> Iterator[Path]:
    """Checkpoint folders under a run, the furthest step first; those without a readable manifest come last."""
    folders = (path for path in (run_folder / CHECKPOINTS).glob("*") if path.is_dir())
    yield from sorted(folders, key=lambda folder: (_step(folder), folder.name), reverse=True)


def _step(folder: Path) -> int:
    # Not by name: Ray's names hold the local time, which another node or the end of summer time sets back.
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes()).step
    except (OSError, ValueError):
        return -1


def newest_valid(store: RunStore, into: Path, say: Callable[[str], None]) -> Path | None:
    """A folder with the run's furthest checkpoint that is whole, or None if it has none; those skipped are said.

    Checkpoints are the objects below `checkpoints/<name>/`; the last part of the store's address is the run key. They
    are brought below `into`, one at a time, where the store is no folder itself.

    Raises:
        StorageUnavailable: the storage does not answer: what it holds is not known.
    """
    run_key = store.url.rpartition("/")[2]
    for name in _furthest_first(store, run_key, say):
        try:
            folder = store.download(f"{CHECKPOINTS}/{name}", into / name)
            verify_checkpoint(folder, run_key)
        except (CorruptCheckpoint, FileNotFoundError, StorageDamaged) as error:
            say(f"skipping a checkpoint: {error}")
            shutil.rmtree(into / name, ignore_errors=True)
        else:
            return folder
    return None


def _furthest_first(store: RunStore, run_key: str, say: Callable[[str], None]) -> list[str]:
    """Names of the run's checkpoints with a manifest; names are not in the order of the steps."""
    found = []
    for name in sorted({name.split("/")[1] for name in store.names(CHECKPOINTS) if name.count("/") > 1}):
        try:
            manifest = Manifest.model_validate_json(store.read(f"{CHECKPOINTS}/{name}/{MANIFEST}"))
            _require_own(name, manifest, run_key)
        except FileNotFoundError:
            say(f"skipping checkpoint {name}: it has no {MANIFEST}, so its upload did not end")
        except (ValueError, StorageDamaged) as error:
            why = (
                error if isinstance(error, CorruptCheckpoint | StorageDamaged) else f"{MANIFEST} is damaged or cut off"
            )
            say(f"skipping checkpoint {name}: {why}")
        else:
            found.append((manifest.step, name))
    return [name for _, name in sorted(found, reverse=True)]


def _require_own(name: str, manifest: Manifest, run_key: str | None) -> None:
    if run_key not in (None, manifest.run_key):
        raise CorruptCheckpoint(f"{name} is of run {manifest.run_key}, not of {run_key}; skip this checkpoint")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON for people and programs. Raises ValueError if `value` holds NaN or an infinity."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part.

    Raises:
        ValueError: `value` holds NaN or an infinity.
    """
    write_whole(path, json_bytes(value))

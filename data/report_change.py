"""What changed between two versions of a dataset, image by image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.images import threads
from data.records import ImageRecord

MAX_EXAMPLES = 20
# Split, digest of the picture's bytes, digest of its labels.
Fingerprint = Sequence[str]


@dataclass(frozen=True)
class Change:
    """Images by what became of them since the version `previous`; one image may count in several ways.

    `num_images`: `added` and `removed` by file name; of those in both, `relabelled` have other boxes or ignore regions,
    `replaced` other pixels, `moved` another split. `examples`: the first MAX_EXAMPLES names of each.
    `objects_per_class`: before and now, over all splits.
    """

    previous: str
    num_images: dict[str, int]
    examples: dict[str, list[str]]
    objects_per_class: dict[str, tuple[int, int]]


def fingerprints(images: Path, records: Mapping[str, Sequence[ImageRecord]]) -> dict[str, Fingerprint]:
    """A fingerprint of every image by file name; every picture is read once."""
    flat = [(split, record) for split, content in records.items() for record in content]
    with threads() as pool:
        digests = list(pool.map(lambda pair: _digest(images / pair[1].file_name), flat))
    return {
        record.file_name: [split, digest, _label_digest(record)]
        for (split, record), digest in zip(flat, digests, strict=True)
    }


def change_since(
    previous: str,
    before: Mapping[str, Fingerprint],
    now: Mapping[str, Fingerprint],
    objects_before: Mapping[str, int],
    objects_now: Mapping[str, int],
) -> Change:
    """Compare the fingerprints and class counts of two versions."""
    in_both = sorted(before.keys() & now.keys())

    def differing(part: int) -> list[str]:
        return [name for name in in_both if before[name][part] != now[name][part]]

    names = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "relabelled": differing(2),
        "replaced": differing(1),
        "moved": differing(0),
    }
    classes = [*objects_now, *(name for name in objects_before if name not in objects_now)]
    return Change(
        previous=previous,
        num_images={what: len(found) for what, found in names.items()},
        examples={what: found[:MAX_EXAMPLES] for what, found in names.items() if found},
        objects_per_class={name: (objects_before.get(name, 0), objects_now.get(name, 0)) for name in classes},
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _label_digest(record: ImageRecord) -> str:
    # In any order: a tool that only sorts its boxes anew has changed nothing.
    rows = [sorted(map(json.dumps, record.boxes)), sorted(map(json.dumps, record.ignore_xywh_px))]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

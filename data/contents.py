"""Which pictures a dataset version holds, by content, without fetching any of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from data.objects import NUM_ATTEMPTS, CorruptObject, Objects, file_list, open_objects


def pictures_of(version: str, source: str, splits: Iterable[str]) -> dict[str, str]:
    """md5 by name of the pictures in some of a version's splits.

    Raises:
        StoreError: see `data.store.materialise`.
    """
    objects = open_objects(source)
    files = file_list(version, objects)
    found: dict[str, str] = {}
    for split in splits:
        document = json.loads(_read_verified(objects, files[f"annotations/{split}.json"]))
        names = [image["file_name"] for image in document["images"]]
        found |= {name: files[f"images/{name}"] for name in names}
    return found


def _read_verified(objects: Objects, md5: str) -> bytes:
    for _ in range(NUM_ATTEMPTS):
        content = objects.read(md5)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return content
    raise CorruptObject(f"{objects.address(md5)} has other content than its name says. Delete it, then fetch it again")

"""Names that MLflow accepts."""

from __future__ import annotations

import hashlib
import re

MAX_CHARACTERS = 250


def metric_name(text: str) -> str:
    """`text`, or where MLflow refuses it: `_` for what is not allowed, and a hash that keeps two such names apart.

    Allowed are letters, digits, `_`, `-`, `.`, space and `:`, in parts between slashes that are neither empty nor `.`
    and do not begin with `..`.
    """
    parts = ("_" if part in ("", ".") else re.sub(r"^\.\.|[^\w.\- :]", "_", part) for part in text.split("/"))
    if (name := "/".join(parts)) == text and len(text) <= MAX_CHARACTERS:
        return text
    suffix = "_" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return name[: MAX_CHARACTERS - len(suffix)] + suffix

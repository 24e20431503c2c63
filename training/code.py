"""Which code trained a run: a hash over everything that the loop and the architecture import."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

from evaluation.result import code_hash, syntax_tree

# Not evaluation: it has no part in the weights, and scores have a hash of their own.
PACKAGES = ("models", "data", "training")
ROOT = "training.loop"
# Starts the loop, and has no part in what it does.
STARTER = "training.torchrun"


def training_code_hash(repo: Path, architecture_module: str) -> str:
    """12 hex digits over the import closure of the loop and one architecture's module, without comments and docstrings.

    `models/__init__.py` is left out: it lists all architectures, and adding one changes no other.
    """
    pending = [ROOT, architecture_module]
    seen: dict[str, Path] = {}
    while pending:
        module = pending.pop()
        path = _source(repo, module)
        if module in seen or path is None or module in {"models", STARTER}:
            continue
        seen[module] = path
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        pending += _imports(package, path.read_bytes())
    return code_hash([seen[module] for module in sorted(seen)])[:12]


def _source(repo: Path, module: str) -> Path | None:
    if module.partition(".")[0] not in PACKAGES:
        return None
    base = repo.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@lru_cache(maxsize=1024)
def _imports(package: str, source: bytes) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(syntax_tree(source)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(found)

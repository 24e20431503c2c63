"""`ScoreResult`: a number and everything one must know to compare it with another."""

from __future__ import annotations

import ast
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.tiling import TileGrid

if TYPE_CHECKING:
    from evaluation.score import Score

_parsing = threading.Lock()
# No stored score depends on what draws, compares runs, or reads other people's files.
_NO_PART = (
    "bootstrap.py", "charts.py", "coco_files.py", "comparison_page.py", "contact_sheet.py", "drawing.py",
    "error_pictures.py", "file_problems.py", "foreground_chart.py", "plots.py", "report_page.py", "report_sections.py",
    "samples.py", "score_files.py", "significance.py", "text_files.py",
)  # fmt: skip
_Count = Annotated[int, Field(ge=0)]
_Key = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ScoreOptions(_Record):
    """How the detections were made and counted; two numbers under different options do not compare.

    `max_detections` caps an image's detections over all classes when they are made; `max_dets` is the protocol's cap
    when they are scored (COCO: per image and class). `tiling`: the tiles that the pictures were looked at by, if any;
    `flip`: whether their mirror images were looked at as well.
    """

    score_threshold: float = Field(ge=0, le=1)
    nms_iou: float = Field(gt=0, le=1)
    max_detections: int = Field(ge=1)
    max_candidates: int = Field(ge=1)
    input_size_px: int = Field(ge=1)
    precision: Literal["bf16", "fp32"]
    max_dets: int = Field(ge=1)
    ignore_rule: Literal["none", "covered-half"]
    tiling: TileGrid | None = Field(None, exclude_if=lambda tiling: tiling is None)
    flip: bool = Field(False, exclude_if=lambda flip: not flip)


class ScoreResult(_Record):
    """Score of one run's detections on one split; None where there was no ground truth to score against.

    `metrics` by name, which carries the protocol (`coco/AP_small`): COCO's, those of `protocol`, the dataset's own, and
    the headlines of `evaluation.analysis`; `per_class` by class name, then metric. Two results with the same
    `score_key`, dataset version and split compare.
    """

    schema_version: Literal[1] = 1
    run_key: _Key
    score_key: _Key
    protocol: str
    dataset_name: str
    dataset_version: str
    split: Literal["train", "val", "test"]
    options: ScoreOptions
    metrics: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    counts: dict[str, _Count]

    @model_validator(mode="after")
    def _names_carry_protocol(self) -> ScoreResult:
        prefixes = ("coco/", f"{self.protocol}/", "analysis/")
        strangers = [name for name in self.metrics if not name.startswith(prefixes)]
        if strangers:
            raise ValueError(f"metric names must start with one of {prefixes}, got {strangers}")
        return self


def score_result(
    scored: Score,
    *,
    protocol: str,
    run_key: str,
    dataset_name: str,
    dataset_version: str,
    split: Literal["train", "val", "test"],
    options: ScoreOptions,
    detection_counts: Mapping[str, int],
) -> ScoreResult:
    """The record of a score. `protocol`: the dataset's own; `detection_counts`: what `detect` left out."""
    return ScoreResult(
        run_key=run_key,
        score_key=score_key(protocol, options),
        protocol=protocol,
        dataset_name=dataset_name,
        dataset_version=dataset_version,
        split=split,
        options=options,
        metrics=scored.metrics,
        per_class=scored.per_class,
        counts={**scored.counts, **detection_counts},
    )


def score_key(protocol: str, options: ScoreOptions) -> str:
    """12 hex digits over protocol, options and the code of this package: any change asks to score again."""
    identity = {"protocol": protocol, "options": options.model_dump(mode="json"), "code": code_hash()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def syntax_tree(source: bytes) -> ast.Module:
    """Parse a Python source, one thread at a time: in Python 3.11 all threads share the parser's count of its depth.

    Two at once may end in `SystemError: AST constructor recursion depth mismatch` (CPython issue 106905).
    """
    with _parsing:
        return ast.parse(source)


def code_hash(sources: Sequence[Path] | None = None) -> str:
    """sha256 over `sources` without comments, docstrings and layout.

    By default over the modules of this package that a score depends on, which leaves out those that only draw.
    """
    if sources is None:
        sources = [path for path in Path(__file__).parent.glob("*.py") if path.name not in _NO_PART]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(f"{path.name}\0{_bare(path.read_bytes())}\0".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _bare(source: bytes) -> str:
    """The same without comments, docstrings and layout. Kept, because a plan asks for the same files for every cell."""
    tree = syntax_tree(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)

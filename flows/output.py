"""How commands print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(value: Any) -> None:
    """Indented JSON on stdout."""
    typer.echo(json.dumps(value, indent=1, default=str, allow_nan=False))


def shown(value: float | str | None) -> str:
    """A metric as text; `-` where there was nothing to find."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_classes(per_class: Mapping[str, Mapping[str, float | None]], names: Iterable[str] | None = None) -> None:
    """A table of metrics by class; all of them unless `names` chooses."""
    if names is None:
        names = (name for values in per_class.values() for name in values)
    names = list(dict.fromkeys(names))
    titles = [name.rpartition("/")[2] for name in names]
    width = max((len(name) for name in per_class), default=0)
    typer.echo("\n" + "per class".ljust(width + 2) + "".join(f"  {title:>6}" for title in titles))
    for name, values in per_class.items():
        texts = (f"{values[n]:.0f}" if n.startswith("num_") else shown(values.get(n)) for n in names)
        columns = (f"  {text:>{max(6, len(title))}}" for text, title in zip(texts, titles, strict=True))
        typer.echo(f"  {name:{width}}" + "".join(columns))

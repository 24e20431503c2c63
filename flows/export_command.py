"""`speck export`: a model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.output import JsonOption, print_json


def export(
    model: Annotated[
        str, typer.Argument(help="Run key or its beginning, models:/NAME@alias, models:/NAME/VERSION, or .safetensors.")
    ],
    out: Annotated[Path, typer.Option(dir_okay=False, help="File that is written.")],
    file_format: Annotated[Literal["onnx"], typer.Option("--format", help="Of the file.")] = "onnx",  # noqa: ARG001
    as_json: JsonOption = False,
) -> None:
    """Write a model as ONNX, from images to boxes and scores before suppression, compared with PyTorch and timed."""
    from dataclasses import asdict

    from flows.export import export_onnx
    from flows.find_model import find_model
    from flows.settings import Settings

    with find_model(model, Settings()) as found:
        exported = export_onnx(found, out)
    if as_json:
        print_json({"run_key": found.run_key, **asdict(exported)})
        return
    typer.echo(f"{found.run_key} in {exported.path}, {exported.size_bytes / 2**20:.1f} MiB")
    typer.echo(
        f"  {exported.num_differing} of {exported.num_compared} anchor points differ from PyTorch's; the others by at "
        f"most {exported.max_box_error_px:.1e} px and a score of {exported.max_score_error:.1e}"
    )
    typer.echo(
        f"  one image on the CPU, threads {exported.threads}: PyTorch {exported.pytorch_ms:.1f} ms, ONNX Runtime "
        f"{exported.onnxruntime_ms:.1f} ms"
    )

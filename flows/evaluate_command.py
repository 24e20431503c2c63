"""`speck evaluate`: the score of any model on any split, and how long it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.output import JsonOption, print_classes, print_json

if TYPE_CHECKING:
    from training.latency import Latency
    from training.scoring import Scored


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Run key or its beginning, models:/NAME@alias, models:/NAME/VERSION, or .safetensors.")
    ],
    dataset: Annotated[
        str | None, typer.Argument(help="In its current version; default: the model's own, as it was trained on.")
    ] = None,
    split: Annotated[Literal["val", "test", "train"], typer.Option(help="Split that is scored.")] = "test",
    input_size: Annotated[int | None, typer.Option(help="Side of the network's input in px.")] = None,
    tiled: Annotated[
        bool | None, typer.Option("--tiled/--whole", help="Tile by tile or whole; default: as the model was scored.")
    ] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of a tile in px.")] = None,
    tile_overlap: Annotated[int | None, typer.Option(help="What neighbours share in px; default: a fifth.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Look at the mirror image as well.")] = None,
    max_dets: Annotated[int | None, typer.Option(help="Detections that count, per image and class.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="More than one: a Ray job; the score is the same.")] = 1,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time the model as well.")] = True,
    architecture: Annotated[str | None, typer.Option(help="Of a weights file without its spec.json.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for report, score, analysis and detections."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model again: a finished run's, a registered one's or a weights file, on any split of its classes."""
    if architecture is not None and input_size is None:
        raise typer.BadParameter(
            "weights alone do not tell the size that they were trained at", param_hint="--input-size"
        )
    from dataclasses import asdict

    from flows.evaluate_model import evaluate_model
    from flows.settings import Settings

    scored, timed, chosen = evaluate_model(
        model,
        Settings(),
        split,
        dataset=dataset,
        architecture=architecture,
        rules={
            "input_size_px": input_size,
            "tiled": tiled,
            "tile_size_px": tile_size,
            "tile_overlap_px": tile_overlap,
            "flip": flip,
            "max_dets": max_dets,
        },
        workers=workers,
        latency=latency,
        out=out,
        say=lambda line: typer.echo(line, err=as_json),
    )
    if as_json:
        print_json(scored.result.model_dump(mode="json") | ({} if timed is None else {"latency": asdict(timed)}))
    else:
        _print(scored, timed, chosen)


def _print(scored: Scored, latency: Latency | None, chosen: str) -> None:
    """`chosen`: how the thresholds were chosen, where that is not how this is scored."""
    result, options = scored.result, scored.result.options
    tiling = options.tiling
    looked_at = "whole pictures" if tiling is None else f"tiles of {tiling.size_px} px, overlap {tiling.overlap_px} px,"
    typer.echo(f"{result.run_key} on {result.dataset_name} {result.dataset_version[:12]} {result.split}")
    typer.echo(
        f"  {looked_at} at {options.input_size_px} px{', and mirrored' if options.flip else ''}; {options.precision}, "
        f"score >= {options.score_threshold:g}, NMS IoU {options.nms_iou:g}, maxDets {options.max_dets}"
    )
    typer.echo("  " + ", ".join(f"{name.removeprefix('num_')} {count}" for name, count in result.counts.items()))
    for name, value in result.metrics.items():
        typer.echo(f"  {name:40} {'-' if value is None else f'{value:.4f}'}")
    print_classes(result.per_class, ["coco/AP", "coco/AP50", f"{result.protocol}/AP"])
    if scored.analysis.chosen_on == result.split == "test":
        typer.echo("  note: nothing on val chose the thresholds of analysis/...: test did, which flatters them")
    elif chosen:
        typer.echo(f"  note: the thresholds of analysis/... were chosen on val, {chosen} of the model's own run")
    if latency is not None:
        what = "images" if tiling is None else "tiles"
        tiles = "" if tiling is None else f"; {latency.inputs_per_image:.1f} tiles an image"
        typer.echo(
            f"  latency on {latency.device}, threads {latency.threads}, {latency.precision}: "
            f"p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f} ms ({latency.num_timed} {what}, one by one); "
            f"{latency.inputs_per_s:.1f} {what}/s in batches of {latency.batch_size}, "
            f"{latency.end_to_end_inputs_per_s:.1f} with decoding{tiles}"
        )

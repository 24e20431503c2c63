"""`speck predict`: a model's detections on any pictures, drawn and as COCO JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.output import JsonOption, print_json


def predict_command(
    model: Annotated[
        str, typer.Argument(help="Run key or its beginning, models:/NAME@alias, models:/NAME/VERSION, or .safetensors.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for detections.json, images.json and pictures/.")],
    score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw boxes from this score on; default: the operating point's.")
    ] = None,
    image_ids: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="COCO file whose pictures are looked at, under its ids; for `speck score`."),
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="Of a weights file without its spec.json.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Whose classes a weights file without its spec.json finds.")
    ] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the network's input in px.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Detect objects on any pictures: draw them, and write all detections in COCO's form, to be scored or loaded."""
    if architecture is not None and input_size is None:
        raise typer.BadParameter(
            "weights alone do not tell the size that they were trained at", param_hint="--input-size"
        )
    from evaluation.analysis_records import UNKNOWN_THRESHOLD
    from flows.evaluate import with_rules
    from flows.find_model import find_model
    from flows.predict import find_pictures, predict, write_predictions
    from flows.settings import Settings

    pictures = find_pictures(images, image_ids, lambda line: typer.echo(line, err=True))
    with find_model(model, Settings(), dataset=dataset, architecture=architecture) as found:
        spec = with_rules(found.spec, found.tiling, input_size_px=input_size)
        predicted = predict(spec, found.weights, pictures, lambda line: typer.echo(line, err=True))
        chosen = None if found.operating_point is None else found.operating_point.shown_score
    shown_score = next(value for value in (score, chosen, UNKNOWN_THRESHOLD) if value is not None)
    write_predictions(predicted, pictures, spec.dataset.card.classes, shown_score, out)
    num_shown = sum(detection["score"] >= shown_score for detection in predicted.detections)
    if as_json:
        print_json(
            {
                "run_key": found.run_key, "out": out, "num_images": len(predicted.images),
                "num_detections": len(predicted.detections), "shown_score": shown_score, "num_shown": num_shown,
                "unreadable": predicted.unreadable,
            }
        )  # fmt: skip
        return
    typer.echo(
        f"{found.run_key}: {num_shown} objects with a score of at least {shown_score:.3f} on "
        f"{len(predicted.images)} pictures, drawn in {out / 'pictures'}"
    )
    typer.echo(f"all {len(predicted.detections)} detections: {out / 'detections.json'}, by the ids of images.json")
    for name, reason in predicted.unreadable.items():
        typer.echo(f"not read: {name}: {reason}", err=True)
    if predicted.unreadable:
        typer.echo(f"{len(predicted.unreadable)} of {len(pictures)} files were not read", err=True)

"""`speck score`: detections that anybody made, by any protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.output import JsonOption, print_classes, print_json, shown

if TYPE_CHECKING:
    from evaluation.score import Score


def score(
    protocol: Annotated[
        Literal["coco", "visdrone", "uavdt", "aitod", "voc"], typer.Option(help="Whose rules the numbers follow.")
    ],
    ground_truth: Annotated[
        Path,
        typer.Option(
            help="COCO JSON file, or folder of VisDrone's annotations/*.txt or of UAVDT's *_gt_whole.txt (GT/)."
        ),
    ],
    detections: Annotated[
        Path, typer.Option(help="COCO results JSON, or folder of official text files, as the ground truth is.")
    ],
    image_sizes: Annotated[
        Path | None,
        typer.Option(help="JSON, width and height by name of the image (UAVDT: sequence), where the files do not say."),
    ] = None,
    max_dets: Annotated[
        int | None, typer.Option(min=1, help="Limit on detections: coco 100 and visdrone 500 if not given.")
    ] = None,
    ignore_rule: Annotated[
        Literal["none", "covered-half"] | None,
        typer.Option(
            help="What happens in ignore regions: coco, aitod, voc; none if not given. The others have their own rule."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score detections in files, without a model, by one protocol's official rules.

    Numbers are from 0 to 1, also where the official toolkit prints percent: visdrone, uavdt. Scores of detections are
    from 0 to 1, too.
    """
    from evaluation.protocols import PROTOCOLS, rules_in_force, score_by
    from evaluation.score_files import read_files

    rules = PROTOCOLS[protocol]
    if max_dets is not None and rules.max_dets is None:
        raise typer.BadParameter(
            f"protocol {protocol} leaves no choice, its limit: {rules.limit}", param_hint="--max-dets"
        )
    if ignore_rule is not None and rules.own_ignore_rule is not None:
        raise typer.BadParameter(
            f"protocol {protocol} has its own: {rules.own_ignore_rule}", param_hint="--ignore-rule"
        )
    files = read_files(ground_truth, detections, image_sizes, with_others=rules.takes_others)
    scored = score_by(protocol, files.tables, max_dets=max_dets, ignore_rule=ignore_rule or "none")
    in_force = rules_in_force(protocol, max_dets=max_dets, ignore_rule=ignore_rule or "none")
    counts, notes = scored.counts | files.counts, [*files.notes, *_notes(scored)]
    num_with_regions = sum(len(regions) > 0 for regions in files.tables.ignore_regions_xywh_px)
    if in_force["ignore_rule"] == "none" and num_with_regions:
        notes.append(f"{num_with_regions} images have ignore regions, not used: --ignore-rule covered-half")
    if as_json:
        print_json(
            {
                "protocol": protocol, "rules": in_force, "counts": counts, "metrics": scored.metrics,
                "per_class": scored.per_class, "notes": notes,
            }
        )  # fmt: skip
        return
    typer.echo(f"protocol {protocol}")
    for title, rows in (("rules", in_force), ("counts", counts), ("metrics", scored.metrics)):
        typer.echo(f"\n{title}")
        for name, value in rows.items():
            typer.echo(f"  {name:28} {shown(value)}")
    print_classes(scored.per_class)
    for note in notes:
        typer.echo(f"\nnote: {note}")


def _notes(scored: Score) -> list[str]:
    unsorted = scored.counts.get("num_unsorted_images", 0)
    if not unsorted:
        return []
    return [
        f"the detections of {unsorted} images are not sorted by score, descending: those beyond max_dets are cut off "
        "in the order of the file, as the official toolkit does; sort them"
    ]

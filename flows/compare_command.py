"""`speck compare`: is one finished run better than another, or did the pictures that it was scored on fall that way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from flows.output import JsonOption, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from data.card import DatasetCard
    from evaluation.significance import Comparison, Difference
    from flows.settings import Settings
    from training.records import RunResult
    from training.scoring import Split

# Fewer draws of fewer things than this say little about what others would give.
FEW_GROUPS = 20


class Grouping(NamedTuple):
    """What is drawn together: a number for each image, what such a group is, and what says so."""

    groups: list[int]
    kind: str
    source: str


def compare_command(
    run_a: Annotated[str, typer.Argument(help="Run key of a finished run, or its beginning.")],
    run_b: Annotated[str, typer.Argument(help="The run that is compared with it.")],
    split: Annotated[Literal["val", "test"], typer.Option(help="Split that both are scored on.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Samples of images that both are scored on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare two finished runs' scores on one split by paired bootstrap: differences with 95% intervals."""
    from dataclasses import asdict

    from flows.evaluate import find_result
    from flows.settings import Settings

    settings = Settings()
    first, second = (find_result(run, settings) for run in (run_a, run_b))
    comparison, grouping = compare_runs(first, second, settings, split, num_samples=samples, seed=seed)
    dataset = first.spec.dataset
    notes = notes_on(comparison, grouping, first, second, split)
    if as_json:
        told = {"runs": [first.run_key, second.run_key], "dataset_version": dataset.version, "split": split}
        print_json(told | {"resampled": grouping.kind, "notes": notes} | asdict(comparison))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, result in (("A", first), ("B", second)):
        typer.echo(f"{name}: {result.spec.title}, run {result.run_key}")
    console.print(as_table(comparison, f"{dataset.name} {dataset.version[:12]} {split}"))
    for note in notes:
        typer.echo(note)


def compare_runs(
    first: RunResult, second: RunResult, settings: Settings, split: Split, *, num_samples: int, seed: int
) -> tuple[Comparison, Grouping]:
    """Compare the detections that both runs kept, by COCO's protocol, on the ground truth of their dataset version.

    Raises:
        NotComparable: another dataset, version or rule of scoring, too few images, or sequences that are not known.
        StoreError: see `data.store.materialise`.
    """
    import json
    from functools import partial

    import numpy as np

    from evaluation.coco import coco_rules
    from evaluation.significance import coco_samples, compare
    from evaluation.tables import tabulate
    from flows.evaluate import dataset_folder

    require_same_rules(first, second, split)
    truth = json.loads((dataset_folder(first.spec, settings) / "annotations" / f"{split}.json").read_bytes())
    detections = (
        json.loads((settings.storage / run.run_key / "artifacts" / f"detections_{split}.json").read_bytes())
        for run in (first, second)
    )
    one, two = (tabulate(truth, found) for found in detections)
    grouping = group_images(one.file_names, first.spec.dataset.card)
    options = first.scores[split].options
    sample = partial(coco_samples, rules=coco_rules(options.max_dets), ignore_rule=options.ignore_rule)
    groups = np.array(grouping.groups, np.int64)
    return compare(one, two, sample, groups=groups, num_samples=num_samples, seed=seed), grouping


def require_same_rules(first: RunResult, second: RunResult, split: Split) -> None:
    """Raises NotComparable: another dataset or version, or scored by other rules."""
    from evaluation.significance import NotComparable

    one, two = (_rules(run, split) for run in (first, second))
    differing = [f"{name} ({one[name]} and {two[name]})" for name in one if one[name] != two[name]]
    if differing:
        raise NotComparable(
            f"runs {first.run_key} and {second.run_key} differ in {', '.join(differing)}: their scores do not compare. "
            "Train or score one again as the other was"
        )


def _rules(run: RunResult, split: Split) -> dict[str, object]:
    options = run.scores[split].options
    return {
        "dataset": run.spec.dataset.name,
        "dataset version": run.spec.dataset.version,
        "max_dets": options.max_dets,
        "ignore_rule": options.ignore_rule,
    }


def group_images(file_names: Sequence[str], card: DatasetCard) -> Grouping:
    """Sequences where the card's split rule or the format tells them, else every image by itself.

    Frames of one sequence resemble each other: drawn one by one they would make a difference look surer than it is.

    Raises:
        NotComparable: the rule does not match the name of an image.
    """
    import re
    from pathlib import PurePosixPath

    from evaluation.significance import NotComparable

    pattern = card.splits.sequence
    if pattern is not None:
        keys = []
        for name in file_names:
            match = re.search(pattern, name)
            if match is None:
                raise NotComparable(
                    f"{name!r} does not match the card's {pattern!r}, so its sequence is not known. Correct "
                    "`splits: {sequence: ...}` in the card"
                )
            keys.append(match[1 if match.re.groups else 0] or "")
        kind, source = "sequences", f"by the card's rule {pattern!r}"
    elif card.format == "uavdt":
        keys = [PurePosixPath(name).parent.name for name in file_names]
        kind, source = "sequences", "by folder"
    else:
        return Grouping(list(range(len(file_names))), "images", "the card tells of no sequences")
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return Grouping([number[key] for key in keys], kind, source)


def notes_on(
    comparison: Comparison, grouping: Grouping, first: RunResult, second: RunResult, split: Split
) -> list[str]:
    """What must be known to read the table: what was drawn, and what the intervals do not see."""
    drawn = f"{comparison.num_groups} {grouping.kind}"
    of_images = f" of {comparison.num_images} images" if comparison.num_groups < comparison.num_images else ""
    notes = [
        f"resampled: {drawn}{of_images} ({grouping.source}), {comparison.num_samples} times, seed {comparison.seed}"
    ]
    one, two = (run.scores[split].options.model_dump() for run in (first, second))
    differing = [f"{name} {one[name]} and {two[name]}" for name in one if one[name] != two[name]]
    if differing:
        notes.append(f"detected under different options, which is part of the difference: {', '.join(differing)}")
    if comparison.num_groups < FEW_GROUPS:
        notes.append(f"warning: of only {drawn}, fewer than {FEW_GROUPS}, these intervals say little")
    partly = [
        name
        for name, found in _rows(comparison)
        if found.verdict is not None and found.num_samples < comparison.num_samples
    ]
    if partly:
        notes.append(f"some samples have no object for {', '.join(partly)}: left out there")
    notes.append(
        "an interval sees which pictures were scored, not what another training seed would give: train several"
    )
    return notes


def as_table(comparison: Comparison, title: str) -> Table:
    """One row a metric, then one a class and metric; differences are B less A."""
    from rich.table import Table

    interval = f"{comparison.confidence:.0%}"
    table = Table(title=title)
    for column in ("metric", "A", "B", "B - A", f"{interval} interval", "B higher in", "B is"):
        table.add_column(column, justify="left" if column in {"metric", "B is"} else "right")
    for name, found in _rows(comparison):
        if found.first is None or found.second is None or found.difference is None:
            table.add_row(name, "-", "-", "", "", "", "no ground truth")
            continue
        bounds = "" if found.low is None or found.high is None else f"{found.low:+.4f} to {found.high:+.4f}"
        share = "" if found.share_better is None else f"{found.share_better:.1%}"
        table.add_row(
            name, f"{found.first:.4f}", f"{found.second:.4f}", f"{found.difference:+.4f}", bounds, share,
            found.verdict or "",
        )  # fmt: skip
    return table


def _rows(comparison: Comparison) -> list[tuple[str, Difference]]:
    of_classes = ((f"{label}: {name}", d) for label, row in comparison.per_class.items() for name, d in row.items())
    return [*comparison.metrics.items(), *of_classes]

"""Comparing two finished runs: what they detected on the same pictures, and what that says about either."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np

from data.card import DatasetCard
from data.whole_file import write_whole
from evaluation.analysis_records import OperatingPoint
from evaluation.comparison_page import Side, write_comparison
from evaluation.samples import samples_by
from evaluation.significance import Comparison, Difference, NotComparable, compare
from evaluation.tables import tabulate
from flows.differences import Fact, differences
from flows.evaluate import dataset_folder
from flows.settings import Settings
from training.artifacts import read_operating_point
from training.records import RunResult
from training.scoring import read_ground_truth

ScoredSplit = Literal["val", "test"]

# Fewer draws of fewer things than this say little about what others would give.
FEW_GROUPS = 20
# An interval's end is where 2.5% of the samples lie beyond: of fewer samples that is a handful.
FEW_SAMPLES = 400
NO_OPERATING_POINT = OperatingPoint(None, {})


class Grouping(NamedTuple):
    """What is drawn together: a number for each image, what such a group is, and what says so."""

    groups: list[int]
    kind: str
    source: str


@dataclass(frozen=True)
class ComparedRuns:
    """Two finished runs on one split; differences are the second's less the first's. `facts`: see `differences`."""

    runs: tuple[RunResult, RunResult]
    split: ScoredSplit
    comparison: Comparison
    grouping: Grouping
    facts: dict[str, list[Fact]]

    @property
    def headline(self) -> str:
        """The difference of AP and its interval, and what that means for the second run."""
        found = self.comparison.metrics["coco/AP"]
        if found.difference is None or found.low is None or found.high is None:
            return f"{self.split}: no ground truth"
        return (
            f"{self.split} coco/AP {found.difference:+.3f}, {self.comparison.confidence:.0%} of samples within "
            f"{found.low:+.3f} to {found.high:+.3f}: {found.verdict}"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the notes."""
        first, second = self.runs
        return {
            "runs": [first.run_key, second.run_key],
            "dataset_version": first.spec.dataset.version,
            "split": self.split,
            "resampled": self.grouping.kind,
            "notes": notes_on(self),
            "differences": {kind: [fact._asdict() for fact in facts] for kind, facts in self.facts.items()},
            **asdict(self.comparison),
        }


def compare_runs(
    first: RunResult,
    second: RunResult,
    settings: Settings,
    split: ScoredSplit,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    out: Path | None = None,
) -> ComparedRuns:
    """Compare the detections that both runs kept, by COCO's protocol and their dataset's own.

    The folder `out`, if given, gets `comparison.json` and `comparison.html`, which shows where the two differ.

    Raises:
        NotComparable: another dataset, version or rule of scoring, too few images, or sequences that are not known.
        StoreError: see `data.store.materialise`.
    """
    require_same_rules(first, second, split)
    folder = dataset_folder(first.spec, settings)
    truth = read_ground_truth(folder, split)
    artifacts = [settings.storage / run.run_key / "artifacts" for run in (first, second)]
    detections = [json.loads((path / f"detections_{split}.json").read_bytes()) for path in artifacts]
    options = first.scores[split].options
    comparison, grouping = compare_detections(
        truth, (detections[0], detections[1]), first.spec.dataset.card,
        max_dets=options.max_dets, num_samples=num_samples, seed=seed,
    )  # fmt: skip
    compared = ComparedRuns((first, second), split, comparison, grouping, differences(first, second, settings))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "comparison.json", json.dumps(compared.as_json(), indent=1, allow_nan=False))
        points = [read_operating_point(path) for path in artifacts]
        sides = [
            Side(f"{run.spec.architecture.label} {run.run_key}", found, (point or NO_OPERATING_POINT).shown_score)
            for run, found, point in zip((first, second), detections, points, strict=True)
        ]
        page = out / "comparison.html"
        dataset = first.spec.dataset
        write_comparison(
            page,
            folder / "images",
            truth,
            (sides[0], sides[1]),
            scored_on=f"{dataset.name} · dataset version {dataset.version} · {split}",
            ignore_rule=options.ignore_rule,
            comparison=comparison,
            notes=notes_on(compared),
            facts=compared.facts,
        )
    return compared


def compare_detections(
    truth: Mapping[str, Any],
    detections: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]],
    card: DatasetCard,
    *,
    max_dets: int,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Comparison, Grouping]:
    """Compare two sets of detections on one ground truth by COCO's protocol and the card's own.

    Raises:
        NotComparable: too few images, or sequences that are not known.
    """
    one, two = (tabulate(truth, found) for found in detections)
    grouping = group_images(one.file_names, card)
    sample = partial(samples_by, card.protocol, max_dets=max_dets, ignore_rule=card.ignore_rule)
    groups = np.array(grouping.groups, np.int64)
    comparison = compare(one, two, sample, groups=groups, num_samples=num_samples, seed=seed, confidence=confidence)
    return comparison, grouping


def require_same_rules(first: RunResult, second: RunResult, split: ScoredSplit) -> None:
    """Raises NotComparable: another dataset or version of it, another protocol, or scored by other rules."""
    one, two = (_rules(run, split) for run in (first, second))
    differing = [f"{name} ({one[name]} and {two[name]})" for name in one if one[name] != two[name]]
    if differing:
        raise NotComparable(
            f"runs {first.run_key} and {second.run_key} differ in {', '.join(differing)}: their scores do not compare. "
            "Train or score one again as the other was"
        )


def _rules(run: RunResult, split: ScoredSplit) -> dict[str, object]:
    options = run.scores[split].options
    return {
        "dataset": run.spec.dataset.name,
        "dataset version": run.spec.dataset.version,
        "protocol": run.scores[split].protocol,
        "max_dets": options.max_dets,
        "ignore_rule": options.ignore_rule,
    }


def group_images(file_names: Sequence[str], card: DatasetCard) -> Grouping:
    """Sequences where the card's split rule or the format tells them, else every image by itself.

    Frames of one sequence resemble each other: drawn one by one they would make a difference look surer than it is.

    Raises:
        NotComparable: the rule does not match the name of an image.
    """
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


def notes_on(compared: ComparedRuns) -> list[str]:
    """What must be known to read the table: what was drawn, and what the intervals do not see."""
    (first, second), split = compared.runs, compared.split
    comparison, grouping = compared.comparison, compared.grouping
    drawn = f"{comparison.num_groups} {grouping.kind}"
    of_images = f" of {comparison.num_images} images" if comparison.num_groups < comparison.num_images else ""
    notes = [
        f"resampled: {drawn}{of_images} ({grouping.source}), {comparison.num_samples} times, seed {comparison.seed}"
    ]
    one, two = (run.scores[split].options.model_dump() for run in (first, second))
    # What is off or as usual is left out of a dump.
    differing = [
        f"{name} {one.get(name, 'as usual')} and {two.get(name, 'as usual')}"
        for name in one | two
        if one.get(name) != two.get(name)
    ]
    if differing:
        notes.append(f"detected under different options, which is part of the difference: {', '.join(differing)}")
    if comparison.num_groups < FEW_GROUPS:
        notes.append(f"warning: of only {drawn}, fewer than {FEW_GROUPS}, these intervals say little")
    if comparison.num_samples < FEW_SAMPLES:
        notes.append(f"warning: {comparison.num_samples} samples are too few for an interval; 1000 are usual")
    partly = [
        name
        for name, found in rows_of(comparison)
        if found.verdict is not None and found.num_samples < comparison.num_samples
    ]
    if partly:
        notes.append(f"some samples have no object for {', '.join(partly)}: left out there")
    notes.append(
        "an interval sees which pictures were scored, not what another training seed would give: train several"
    )
    return notes


def rows_of(comparison: Comparison) -> list[tuple[str, Difference]]:
    """Differences by metric, then by class and metric."""
    of_classes = ((f"{label}: {name}", d) for label, row in comparison.per_class.items() for name, d in row.items())
    return [*comparison.metrics.items(), *of_classes]

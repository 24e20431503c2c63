"""The files that a finished run leaves behind: weights, scores, detections, analysis, pictures and the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data.whole_file import write_whole
from evaluation.analysis_records import OperatingPoint
from evaluation.contact_sheet import predictions_page
from evaluation.foreground_chart import foreground_chart
from evaluation.plots import pr_plot, training_curves
from evaluation.report_page import ExtraPicture, write_report
from evaluation.report_sections import SplitReport
from training.checkpoint import save_tensors, write_json
from training.records import JournalEntry
from training.scoring import Scored, Split
from training.spec import RunSpec
from training.trace import TRACE

OPERATING_POINT = "operating_point.json"
_FOREGROUND = (
    "A score is foreground times class. Each point is an object of the split: both at the anchor point that speaks "
    "best for it. Missed objects at the top left have a strong class and are lost to a weak foreground score."
)


def write_artifacts(
    spec: RunSpec,
    weights: dict[str, Any],
    scored: Mapping[Split, Scored],
    seconds: dict[str, float],
    dataset_folder: Path,
    folder: Path,
    journal: Sequence[JournalEntry],
) -> None:
    """Everything about a run into a folder, all of it or nothing. `scored` holds val and test.

    A trace that lies in the folder stays: it is the training's, and scoring again makes none.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    # What a killed worker left.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tensors(partial / "weights.safetensors", weights)
        write_json(partial / "spec.json", spec.model_dump(mode="json"))
        write_json(partial / "seconds.json", seconds)
        write_json(partial / OPERATING_POINT, asdict(scored["val"].analysis.operating_point))
        write_scores(partial, spec, scored, dataset_folder)
        test = scored["test"]
        pr_plot(test.precision_at_50, partial / "pr_curve_test.png")
        predictions_page(
            dataset_folder / "images",
            test.ground_truth,
            test.detections,
            partial / "predictions_test.jpg",
            ignore_rule=test.result.options.ignore_rule,
            score_threshold=test.analysis.operating_point.shown_score,
        )
        training_curves([{"epoch": entry.epoch, **entry.metrics} for entry in journal], partial / "training_curves.png")
        if (folder / TRACE).is_file():
            shutil.copyfile(folder / TRACE, partial / TRACE)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_scores(
    folder: Path,
    spec: RunSpec,
    scored: Mapping[Split, Scored],
    dataset_folder: Path,
    speed: Mapping[str, float] | None = None,
) -> None:
    """Scores, detections, analyses and the foreground picture of each split, and the report of all of them.

    The last split counts most in the report. `speed`: numbers by name, to be shown there.
    """
    reports, pictures = [], []
    for split, content in scored.items():
        write_json(folder / f"score_{split}.json", content.result.model_dump(mode="json"))
        write_whole(folder / f"detections_{split}.json", json.dumps(content.detections, allow_nan=False))
        write_json(folder / f"analysis_{split}.json", asdict(content.analysis))
        write_json(folder / f"foreground_{split}.json", asdict(content.foreground))
        picture = folder / f"foreground_{split}.png"
        foreground_chart(content.foreground, picture)
        pictures.append(ExtraPicture(split, picture.read_bytes(), _FOREGROUND))
        reports.append(
            SplitReport(
                content.result, content.precision_at_50, content.analysis, content.ground_truth, content.detections
            )
        )
    write_report(
        folder / "report.html",
        spec.architecture.label,
        reports,
        dataset_folder / "images",
        speed=speed,
        extra_pictures=pictures,
    )


def read_operating_point(folder: Path) -> OperatingPoint | None:
    """What `write_artifacts` left in a folder, None where there is no such file."""
    path = folder / OPERATING_POINT
    return TypeAdapter(OperatingPoint).validate_json(path.read_bytes()) if path.is_file() else None

"""Hand-made pictures, ground truth and analyses for the tests of reports."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from evaluation.analysis_records import (
    SIZES_PX,
    Analysis,
    Confusion,
    ErrorTypes,
    IgnoredHits,
    Inspection,
    InspectionPoint,
    OperatingPoint,
    Reliability,
    ReliabilityBin,
    SizeRecall,
    Threshold,
)
from evaluation.coco import score
from evaluation.report_sections import SplitReport
from evaluation.result import ScoreOptions, score_result

OPTIONS = ScoreOptions(
    score_threshold=0.01, nms_iou=0.65, max_detections=300, max_candidates=1000, input_size_px=640, precision="fp32",
    max_dets=100, ignore_rule="covered-half",
)  # fmt: skip
# Those that HTML never closes.
VOID = {"br", "img", "meta"}


def scene(folder: Path, names: list[str], classes: list[str], size_px: tuple[int, int] = (128, 96)) -> dict[str, Any]:
    """Ground truth of one image a name, with noise as pictures and three objects of 8 px in each."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size_px
    rng = np.random.default_rng(0)
    for name in names:
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    return {
        "images": [{"id": i, "file_name": name, "width": width, "height": height} for i, name in enumerate(names, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "annotations": [
            {"image_id": i, "category_id": 1 + number % len(classes), "bbox": [10.0 + 30 * number, 20.0, 8.0, 8.0]}
            for i in range(1, 1 + len(names))
            for number in range(3)
        ],
    }


def found(image_id: int, category_id: int, bbox: list[float], confidence: float = 0.9) -> dict[str, Any]:
    """One detection."""
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": confidence}


def analysis(classes: list[str], *, has_objects: bool = True) -> Analysis:
    """Numbers that fit no detections, but together."""
    num = len(classes)
    best = Threshold(score=0.5, precision=0.75, recall=0.6, f1=2 / 3) if has_objects else None
    point = InspectionPoint(0.5, 0.25, 0.125, 0.5)
    return Analysis(
        operating_point=OperatingPoint(best, dict.fromkeys(classes, best)),
        chosen_on="val",
        error_types=ErrorTypes(
            0.5 if has_objects else None,
            {"class": 3, "missed": 40} if has_objects else {},
            {"class": 0.01, "missed": 0.25} if has_objects else {},
        ),
        recall_by_size=[
            SizeRecall(size, 8 * has_objects, 4 * has_objects, 2 * has_objects, dict.fromkeys(classes, (8, 4, 2)))
            for size in SIZES_PX
        ],
        ap_by_size=dict.fromkeys(SIZES_PX, 0.25 if has_objects else None),
        confusion=Confusion(tuple(classes), (np.eye(num + 1, dtype=int) * 5).tolist()),
        reliability=Reliability(
            [ReliabilityBin(0.5, 0.75, 20, 0.625, 0.5), ReliabilityBin(0.75, 1, 10, 0.9, 1.0)], 0.1
        ),
        inspection=Inspection(8, 8, point, [InspectionPoint(0.0, 0.0, 1.0, 2.0), point]),
        ignored_hits=IgnoredHits(1, 2),
    )


def split_report(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], split: Any = "test", dataset: str = "tiny"
) -> SplitReport:
    """The score of the detections, with the analysis above."""
    scored = score(ground_truth, detections, ignore_rule=OPTIONS.ignore_rule)
    result = score_result(
        scored, protocol="coco", run_key="0123456789ab", dataset_name=dataset, dataset_version="v1", split=split,
        options=OPTIONS, detection_counts={},
    )  # fmt: skip
    classes = [category["name"] for category in ground_truth["categories"]]
    made = analysis(classes, has_objects=bool(ground_truth["annotations"]))
    return SplitReport(result, scored.precision_at_50, made, ground_truth, detections)


class Page(HTMLParser):
    """Tags, attributes and words of a page; `problems` are tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.problems += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """Attributes of all such tags."""
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]

    @property
    def text(self) -> str:
        """All that is to be read."""
        return " ".join(" ".join(self.words).split())

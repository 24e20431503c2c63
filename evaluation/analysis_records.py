"""Where a score is lost, and how a model behaves where it is used: the records of one split's analysis.

All of it is plain values: `dataclasses.asdict` gives what `analysis_<split>.json` of a run holds.
"""

from __future__ import annotations

from dataclasses import dataclass

# Sides, sqrt(area), in pixels: from the first number to below the second. AI-TOD's bounds.
SIZES_PX: dict[str, tuple[float, float]] = {
    "below 8 px": (0, 8), "8-16 px": (8, 16), "16-32 px": (16, 32), "32-64 px": (32, 64),
    "64 px and more": (64, float("inf")),
}  # fmt: skip

# Where nothing was found no threshold is best.
UNKNOWN_THRESHOLD = 0.3


@dataclass(frozen=True)
class Threshold:
    """A score from which detections count, and what that gives at IoU .50; F1 is the harmonic mean of both.

    What it gives is None where there are no objects: the score was chosen on another split.
    """

    score: float
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds of the highest F1: one for all classes together, and by class name; None where there is none.

    That is where no threshold gave a hit on the split it was chosen on.
    """

    overall: Threshold | None
    per_class: dict[str, Threshold | None]

    @property
    def shown_score(self) -> float:
        """The score from which detections count: the overall threshold, or UNKNOWN_THRESHOLD where it has none."""
        return UNKNOWN_THRESHOLD if self.overall is None else self.overall.score


@dataclass(frozen=True)
class ErrorTypes:
    """What keeps AP50 from 1, by type: class, localisation, both, duplicate, background, missed (Bolya et al. 2020).

    `counts`: errors of that type at the operating point; `lost_ap50`: how much AP50, the mean over classes, would gain
    if errors of this type alone, at any score, were mended; also of all `false positives` and all `false negatives`.
    Empty without objects, where AP50 is None.
    """

    ap50: float | None
    counts: dict[str, int]
    lost_ap50: dict[str, float]


@dataclass(frozen=True)
class SizeRecall:
    """Objects of one of `SIZES_PX` and how many were found at IoU .50: at any score, and at the operating point.

    `per_class`: by class name, number of objects, found at any score, found at the operating point.
    """

    size: str
    num_objects: int
    num_found: int
    num_found_at_threshold: int
    per_class: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Confusion:
    """Objects by true class (rows) and the class of the detection that found them (columns), at the operating point.

    Both have one more at the end: the last row counts detections left over, the last column objects not found.
    """

    class_names: tuple[str, ...]
    counts: list[list[int]]


@dataclass(frozen=True)
class ReliabilityBin:
    """Detections with scores from `low` to below `high`: how many, their mean score, and the share that are right.

    The last bin includes its `high`.
    """

    low: float
    high: float
    num_detections: int
    mean_score: float | None
    precision: float | None


@dataclass(frozen=True)
class Reliability:
    """Whether a score of .8 means right in 8 of 10 cases; the error is the mean gap, weighted by detections."""

    bins: list[ReliabilityBin]
    expected_calibration_error: float | None


@dataclass(frozen=True)
class InspectionPoint:
    """Image-level rates at one threshold; None where there is no such image.

    `escape_rate`: share of the images with objects in which nothing is reported, right or wrong; `overkill_rate`: share
    of the images without objects in which something is; `false_positives_per_clean_image`: detections per image
    without objects.
    """

    threshold: float
    escape_rate: float | None
    overkill_rate: float | None
    false_positives_per_clean_image: float | None


@dataclass(frozen=True)
class Inspection:
    """What an inspector asks: which parts with a defect pass, which good ones are stopped.

    Images with nothing but ignored objects or crowds are in neither number.
    """

    num_images_with_objects: int
    num_images_without: int
    at_operating_point: InspectionPoint
    curve: list[InspectionPoint]


@dataclass(frozen=True)
class IgnoredHits:
    """Detections at or above the operating point that count neither way: in ignore regions, and on crowd boxes."""

    in_regions: int
    on_crowds: int


@dataclass(frozen=True)
class Analysis:
    """`operating_point` was chosen on the split `chosen_on`: on val, also for test, which must not choose.

    Its precision, recall and F1 are those of the split analysed. `ap_by_size`: AP by COCO's rules, .50:.05:.95, by
    `SIZES_PX`; as in pycocotools an object on a bound belongs to both sizes.
    """

    operating_point: OperatingPoint
    chosen_on: str
    error_types: ErrorTypes
    recall_by_size: list[SizeRecall]
    ap_by_size: dict[str, float | None]
    confusion: Confusion
    reliability: Reliability
    inspection: Inspection
    ignored_hits: IgnoredHits

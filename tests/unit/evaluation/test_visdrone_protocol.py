"""VisDrone's protocol against the official toolkit's own output, its wrong readings, and a plain loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evaluation import visdrone
from evaluation.ignore import covered_area_px
from evaluation.matching import ranks
from evaluation.score_files import read_files
from evaluation.tables import DetectionTable, Tables, TruthTable, tabulate
from evaluation.visdrone import covered_fraction, score_visdrone

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
FIXTURE = SHARED / "visdrone_small"
NAMES = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500")
OTHERS = 10


@cache
def official() -> tuple[dict[str, Any], Tables]:
    if not FIXTURE.is_dir():
        pytest.skip(f"{FIXTURE} is absent: the toolkit's output is not part of the project")
    files = read_files(FIXTURE, FIXTURE / "detections", FIXTURE / "image_sizes.json", with_others=True)
    return json.loads((FIXTURE / "expected.json").read_text()), files.tables


def percent(metrics: dict[str, float | None], suffix: str = "") -> dict[str, float]:
    """Metrics by the toolkit's names, in percent."""
    return {name: 100 * (metrics[f"visdrone/{name.replace('AR', 'AR_')}{suffix}"] or 0) for name in NAMES}


def summary(tables: Tables) -> dict[str, float]:
    return percent(score_visdrone(tables).metrics)


def change(wrong: dict[str, float], tables: Tables) -> dict[str, float]:
    right = summary(tables)
    return {name: wrong[name] - right[name] for name in NAMES}


def test_summary_and_classes_equal_the_official_toolkit() -> None:
    expected, tables = official()
    scored = score_visdrone(tables)
    assert percent(scored.metrics) == pytest.approx(expected["visdrone"]["summary"], abs=1e-9, rel=0)
    assert len(scored.per_class) == 10
    for known in expected["visdrone"]["per_class"].values():
        values = scored.per_class[known["name"]]
        assert percent(values) == pytest.approx({name: known[name] for name in NAMES}, abs=1e-9, rel=0)
        assert (values["num_images"], values["num_ground_truths"]) == (known["images_with_class"], known["objects"])
    macro = {name: np.mean([known[name] for known in expected["visdrone"]["per_class"].values()]) for name in NAMES}
    assert percent(scored.metrics, "_macro") == pytest.approx(macro, abs=1e-9, rel=0)


def test_ap_and_ar_at_every_threshold_equal_the_official_toolkit() -> None:
    expected, tables = official()
    outcomes = visdrone.visdrone_outcomes(tables)
    for category, known in expected["visdrone"]["per_class"].items():
        rows = outcomes.detections.label == int(category) - 1
        for t in range(10):
            ap = visdrone.average_precision(
                outcomes.is_hit[-1, t, rows], outcomes.is_counted[t, rows], known["objects"]
            )
            assert 100 * (ap or 0) == pytest.approx(known["AP_per_iou"][t], abs=1e-9, rel=0)
            recall = 100 * outcomes.is_hit[:, t, rows].sum(axis=1) / known["objects"]
            assert recall == pytest.approx(known["AR_per_iou_and_maxdets"][t], abs=1e-9, rel=0)


def test_as_many_rows_are_left_after_the_drop_in_every_image() -> None:
    expected, tables = official()
    left = [
        np.bincount(table.image[~visdrone.in_ignored_pixels(table, tables)], minlength=len(tables.image_ids)).tolist()
        for table in (tables.truths, tables.detections)
    ]
    found = dict(zip((Path(name).stem for name in tables.file_names), zip(*left, strict=True), strict=True))
    assert found == {stem: tuple(kept) for stem, kept in expected["visdrone"]["kept_after_drop"]["images"].items()}
    counts = score_visdrone(tables).counts
    assert counts["num_ground_truths"] + counts["num_unscored_ground_truths"] == sum(left[0])
    assert counts["num_detections"] == sum(left[1])
    assert counts["num_ignored_detections"] == len(tables.detections.label) - sum(left[1])
    assert counts["num_unsorted_images"] == 0


def none_ignored(table: TruthTable | DetectionTable, _: Tables) -> NDArray[np.bool_]:
    return np.zeros(len(table.image), bool)


def detections_only(table: TruthTable | DetectionTable, tables: Tables) -> NDArray[np.bool_]:
    right = none_ignored if isinstance(table, TruthTable) else visdrone_ignored
    return right(table, tables)


visdrone_ignored, visdrone_fraction = visdrone.in_ignored_pixels, visdrone.covered_fraction


def by_centre(boxes: NDArray[Any], regions: NDArray[Any], _: NDArray[Any]) -> NDArray[Any]:
    centres, regions = (boxes[:, :2] + boxes[:, 2:] / 2)[:, None], regions[None]
    is_inside = (centres >= regions[..., :2]) & (centres <= regions[..., :2] + regions[..., 2:])
    inside: NDArray[Any] = is_inside.all(axis=2).any(axis=1).astype(float)
    return inside


def exact_cover(boxes: NDArray[Any], regions: NDArray[Any], _: NDArray[Any]) -> NDArray[Any]:
    cover: NDArray[Any] = covered_area_px(boxes, regions) / (boxes[:, 2] * boxes[:, 3])
    return cover


def boxes_from_0(boxes: NDArray[Any], regions: NDArray[Any], size: NDArray[Any]) -> NDArray[Any]:
    return visdrone_fraction(boxes - [1, 1, 0, 0], regions, size)


def just_less(*arguments: Any) -> NDArray[Any]:
    return visdrone_fraction(*arguments) - 1e-12


def rounded_by(function: Callable[[Any], Any]) -> Callable[..., NDArray[Any]]:
    def whole(boxes: NDArray[Any], size: NDArray[Any]) -> NDArray[Any]:
        rounded: NDArray[Any] = np.maximum(1.0, function(boxes))
        rounded[:, :2] = np.minimum(rounded[:, :2], size)
        return rounded

    return whole


def at_101_points(is_hit: NDArray[np.bool_], is_counted: NDArray[np.bool_], num_truths: int) -> float:
    hits = np.cumsum(is_hit)
    precision, recall = hits / np.maximum(np.cumsum(is_counted), 1), hits / num_truths
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.linspace(0, 1, 101)]))


@pytest.mark.parametrize(
    ("reading", "name", "wrong"),
    [
        ("no ignored-region handling", "in_ignored_pixels", none_ignored),
        ("ignored regions drop detections only", "in_ignored_pixels", detections_only),
        ("drop by box centre", "covered_fraction", by_centre),
        ("maxDets per class", "places_in_file", lambda found: ranks(found, found.image * 11 + found.label)),
        ("IoU strictly above threshold", "IOU_THRESHOLDS", np.nextafter(visdrone.IOU_THRESHOLDS, 1)),
        ("101-point AP", "average_precision", at_101_points),
        ("round half to even", "whole_pixels", rounded_by(np.round)),
        ("coordinates truncated, not rounded", "whole_pixels", rounded_by(np.trunc)),
        ("coordinates shifted by -1 (0-based)", "covered_fraction", boxes_from_0),
        ("kept at exactly 0.5 covered", "covered_fraction", just_less),
        ("numpy linspace thresholds (must be 0)", "IOU_THRESHOLDS", np.linspace(0.5, 0.95, 10)),
        (
            "MATLAB two-ended colon thresholds (must be 0)",
            "IOU_THRESHOLDS",
            np.concatenate([0.5 + 0.05 * np.arange(5), 0.95 - 0.05 * np.arange(5)[::-1]]),
        ),
    ],
)
def test_a_wrong_reading_gives_the_wrong_number(
    monkeypatch: pytest.MonkeyPatch, reading: str, name: str, wrong: object
) -> None:
    expected, tables = official()
    monkeypatch.setattr(visdrone, name, wrong)
    misread = summary(tables)
    monkeypatch.undo()
    known = expected["sensitivity"]["changes"][reading]
    assert change(misread, tables) == pytest.approx(known, abs=1e-9, rel=0)


def test_the_exact_share_of_a_box_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fixture's own number for this reading depends on details that it does not tell.
    _, tables = official()
    monkeypatch.setattr(visdrone, "covered_fraction", exact_cover)
    misread = summary(tables)
    monkeypatch.undo()
    assert max(map(abs, change(misread, tables).values())) > 0.01


def test_another_order_of_rules_gives_the_wrong_number() -> None:
    expected, tables = official()
    found = tables.detections
    changes = expected["sensitivity"]["changes"]
    for reading, is_kept in (
        ("truncate to 500 before the drop", visdrone.places_in_file(found) < 500),
        ("category 11 removed before truncation", found.label != OTHERS),
    ):
        wrong = summary(tables._replace(detections=found.take(is_kept)))
        assert change(wrong, tables) == pytest.approx(changes[reading], abs=1e-9, rel=0)


def test_another_mean_over_classes_gives_the_wrong_number() -> None:
    expected, tables = official()
    scored = score_visdrone(tables)
    changes = expected["sensitivity"]["changes"]
    uniform = percent(scored.metrics, "_macro")
    assert change(uniform, tables) == pytest.approx(changes["uniform class mean"], abs=1e-9, rel=0)
    objects = [values["num_ground_truths"] for values in scored.per_class.values()]
    columns = [percent(values) for values in scored.per_class.values()]
    weighted = {
        name: float(np.average([column[name] for column in columns], weights=np.array(objects, float)))
        for name in NAMES
    }
    assert change(weighted, tables) == pytest.approx(changes["class mean weighted by objects"], abs=1e-9, rel=0)


def test_ties_in_reverse_order_give_the_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, tables = official()
    backwards = tables._replace(
        detections=tables.detections.take(np.arange(len(tables.detections.label))[::-1]),
        file_names=tuple(f"{rank:03}" for rank in range(len(tables.file_names), 0, -1)),
    )

    def places(found: DetectionTable) -> NDArray[np.int64]:
        from_the_end = ranks(found._replace(scores=np.zeros(len(found.scores))), found.image)
        return np.bincount(found.image)[found.image] - 1 - from_the_end

    monkeypatch.setattr(visdrone, "places_in_file", places)
    misread = summary(backwards)
    monkeypatch.undo()
    known = expected["sensitivity"]["changes"]["ties in reverse order"]
    assert change(misread, tables) == pytest.approx(known, abs=1e-9, rel=0)


boxes = st.tuples(st.floats(-20, 90), st.floats(-20, 90), st.floats(0.1, 60), st.floats(0.1, 60))


@given(st.lists(boxes, min_size=1, max_size=6), st.lists(boxes, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_covered_fraction_is_that_of_a_painted_mask(found: list[Any], regions: list[Any]) -> None:
    width, height = 80, 60

    def whole(box: tuple[float, ...]) -> list[int]:
        x, y, w, h = (max(1, int(np.floor(abs(side) + 0.5) * np.sign(side))) for side in box)
        return [min(x, width), min(y, height), w, h]

    mask = np.zeros((height + 1, width + 1), bool)
    for x, y, w, h in map(whole, regions):
        mask[y : min(height, y + h) + 1, x : min(width, x + w) + 1] = True
    expected = []
    for x, y, w, h in map(whole, found):
        expected.append(mask[y + 1 : min(height, y + h) + 1, x + 1 : min(width, x + w) + 1].sum() / (w * h))
    fraction = covered_fraction(np.array(found), np.array(regions), np.array([width, height]))
    assert fraction.tolist() == expected


def plain_summary(tables: Tables, max_dets: int) -> dict[str, float | None]:
    """The protocol without ignore regions, as loops."""
    truths, found = tables.truths, tables.detections
    limits = [*(limit for limit in (1, 10, 100) if limit < max_dets), max_dets]
    names = [*("AP", "AP50", "AP75"), *(f"AR_{limit}" for limit in limits)]
    totals, weights = np.zeros(len(names)), 0
    for label in range(len(tables.class_ids)):
        objects = [row for row in range(len(truths.label)) if truths.label[row] == label]
        if not objects:
            continue
        ap, recalls = [], np.zeros((len(limits), 10))
        for m, limit in enumerate(limits):
            for t, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
                events = []
                for image in range(len(tables.image_ids)):
                    first = [row for row in range(len(found.label)) if found.image[row] == image][:limit]
                    mine = [row for row in first if found.label[row] == label]
                    free = [row for row in objects if truths.image[row] == image]
                    for row in sorted(mine, key=lambda row: -found.scores[row]):
                        ious = [(iou(found.boxes_xywh_px[row], truths.boxes_xywh_px[g]), g) for g in free]
                        best = max(ious, default=(0.0, -1))
                        if best[0] >= threshold:
                            free.remove(best[1])
                        events.append((-found.scores[row], best[0] >= threshold))
                # A stable sort: images in order, within them by score.
                hits = np.cumsum([hit for _, hit in sorted(events, key=lambda event: event[0])])
                recalls[m, t] = hits[-1] / len(objects) if len(hits) else 0
                if m == len(limits) - 1:
                    precision = hits / np.arange(1, len(hits) + 1)
                    steps = np.diff(hits, prepend=0)
                    ap.append(sum(step * precision[k:].max() for k, step in enumerate(steps)) / len(objects))
        weight = len({int(truths.image[row]) for row in objects})
        totals += weight * np.array([np.mean(ap), ap[0], ap[5], *recalls.mean(axis=1)])
        weights += weight
    return {f"visdrone/{name}": total / weights for name, total in zip(names, totals, strict=True)}


def iou(one: NDArray[Any], other: NDArray[Any]) -> float:
    w, h = np.minimum(one[:2] + one[2:], other[:2] + other[2:]) - np.maximum(one[:2], other[:2])
    overlap = max(w, 0) * max(h, 0)
    return float(overlap / (one[2] * one[3] + other[2] * other[3] - overlap))


@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_loops_also_when_the_file_is_not_sorted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_truths, num_found, num_images = 30, 90, 4
    centre = rng.integers(0, 60, (num_truths, 2))
    truth_boxes = np.concatenate([centre, rng.integers(6, 30, (num_truths, 2))], axis=1).astype(float)
    image, label = rng.integers(0, num_images, num_truths), rng.integers(0, 3, num_truths)
    source = rng.integers(0, num_truths, num_found)
    found_boxes = truth_boxes[source] + rng.integers(-3, 4, (num_found, 4)) * (rng.random((num_found, 1)) < 0.7)
    tables = Tables(
        TruthTable(image, label, truth_boxes, truth_boxes[:, 2:].prod(axis=1), np.zeros(num_truths, bool)),
        DetectionTable(image[source], label[source], found_boxes, rng.integers(0, 8, num_found) / 8),
        np.arange(num_images), tuple("abcd"), np.full((num_images, 2), 100), (np.empty((0, 4)),) * num_images,
        np.arange(1, 4), ("car", "bus", "van"),
    )  # fmt: skip
    scored = score_visdrone(tables, 20)
    expected = plain_summary(tables, 20)
    assert {name: scored.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert scored.counts["num_unsorted_images"] > 0
    assert scored.counts["num_truncated_detections"] > 0


def small(*, regions: object = (), truth: object = (), **image: object) -> Tables:
    one = {"id": 1, "file_name": "a.jpg", "ignore_regions_xywh": regions, **image}
    document = {
        "images": [one],
        "categories": [{"id": 1, "name": "car"}, {"id": 11, "name": "others"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10]}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10], "score": 0.5}]
    return tabulate(document, found)


def test_a_size_is_needed_only_where_there_are_regions() -> None:
    assert score_visdrone(small()).metrics["visdrone/AP"] == 1.0
    with pytest.raises(visdrone.UnknownImageSize, match=r"1 images have .* for example 'a.jpg'"):
        score_visdrone(small(regions=[[50, 50, 10, 10]]))
    sized = score_visdrone(small(regions=[[10, 10, 10, 10]], width=100, height=100))
    assert set(sized.metrics.values()) == {None}
    assert (sized.counts["num_ignored_ground_truths"], sized.counts["num_ignored_detections"]) == (1, 1)
    assert list(sized.per_class) == ["car"]
    with pytest.raises(ValueError, match="max_dets is 0"):
        score_visdrone(small(), 0)


def test_detections_on_an_object_of_score_0_count_neither_way() -> None:
    tables = small()
    crowd = tables._replace(truths=tables.truths._replace(is_crowd=np.array([True])))
    assert score_visdrone(crowd).metrics["visdrone/AP"] is None
    twice = tables.truths.take(np.array([0, 0]))._replace(is_crowd=np.array([True, False]))
    twice.boxes_xywh_px[1] += 40
    both = tables.detections.take(np.array([0, 0]))
    both.boxes_xywh_px[1] += 40
    assert score_visdrone(tables._replace(truths=twice, detections=both)).metrics["visdrone/AP"] == 1.0

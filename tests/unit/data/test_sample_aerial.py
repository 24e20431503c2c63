from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.card import CATALOG, DatasetCard
from data.problems import InvalidDataset
from data.samples.aerial import render, render_with_instances
from data.samples.aerial_objects import BICYCLE, BOAT, PERSON, VEHICLE, Layer, polygon, rasterise, turn
from data.samples.scene import Recipe, Scene, load_recipe

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "data" / "raw" / "sample-aerial"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(FOLDER)


@pytest.fixture(scope="module")
def scenes(recipe: Recipe) -> list[tuple[Scene, np.ndarray]]:
    """Every second picture of val and test, with its instance map."""
    jobs = [(split, index) for split in ("val", "test") for index in range(0, recipe.num_images[split], 2)]
    return [render_with_instances(recipe, split, index) for split, index in jobs]


def _digest(scene: Scene) -> str:
    parts = (scene.image_bgr, scene.boxes_xyxy_px, scene.labels, scene.ignore_xyxy_px)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_another_process_with_another_thread_count_renders_the_same_bytes(recipe):
    code = (
        "import hashlib, sys, cv2; from pathlib import Path\n"
        "from data.samples.aerial import render; from data.samples.scene import load_recipe\n"
        "cv2.setNumThreads(1); cv2.setUseOptimized(False)\n"
        "for split, index in (('test', 3), ('train', 399)):\n"
        "    s = render(load_recipe(Path(sys.argv[1])), split, index)\n"
        "    parts = (s.image_bgr, s.boxes_xyxy_px, s.labels, s.ignore_xyxy_px)\n"
        "    print(hashlib.sha256(b''.join(p.tobytes() for p in parts)).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [_digest(render(recipe, "test", 3)), _digest(render(recipe, "train", 399))]


def test_seed_split_and_index_each_change_the_picture(recipe):
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    pictures = [render(recipe, "val", 0), render(recipe, "val", 1), render(recipe, "test", 0), render(other, "val", 0)]
    assert all(a.image_bgr.tobytes() != b.image_bgr.tobytes() for a, b in combinations(pictures, 2))


def test_scene_has_the_promised_types(recipe, scenes):
    size = recipe.image_size_px
    for scene, _ in scenes:
        assert (scene.image_bgr.shape, scene.image_bgr.dtype) == ((size, size, 3), np.uint8)
        assert (scene.boxes_xyxy_px.shape, scene.boxes_xyxy_px.dtype) == ((len(scene.labels), 4), np.float32)
        assert (scene.labels.dtype, scene.ignore_xyxy_px.dtype) == (np.int64, np.float32)


def test_boxes_lie_inside_the_picture_and_measure_4_to_24_px(recipe, scenes):
    boxes = np.concatenate([scene.boxes_xyxy_px for scene, _ in scenes])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0
    assert boxes.max() <= recipe.image_size_px
    assert sides.min() > 0
    assert sides.max(axis=1).min() >= 4
    assert sides.max(axis=1).max() <= 24


def test_boxes_are_tight_around_the_pixels_of_their_object(scenes):
    gaps = []
    for scene, instances in scenes:
        for row, box in enumerate(scene.boxes_xyxy_px):
            y, x = np.nonzero(instances == row + 1)
            gaps.append(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box)
    # A pixel counts as the object's when it is covered by more than a third; the boxes are finer than that.
    assert np.abs(gaps).max() <= 1.5
    assert np.abs(np.mean(gaps, axis=0)).max() <= 0.5


@pytest.mark.parametrize(("heading_rad", "width_px", "height_px"), [(0.0, 12, 6), (np.pi / 2, 6, 12)])
def test_rasterised_box_is_that_of_the_drawing(heading_rad, width_px, height_px):
    oblong = [Layer(polygon(-2, -1, 2, -1, 2, 1, -2, 1), (9, 9, 9))]
    sprite = rasterise(oblong, turn(heading_rad), 12.0, (50.0, 40.0), 100)
    assert sprite is not None
    expected = (50 - width_px / 2, 40 - height_px / 2, 50 + width_px / 2, 40 + height_px / 2)
    assert sprite.box_xyxy_px == pytest.approx(expected, abs=0.25)
    assert sprite.visible_share == 1


def test_rasterised_object_is_cut_at_the_border():
    oblong = [Layer(polygon(-2, -1, 2, -1, 2, 1, -2, 1), (9, 9, 9))]
    sprite = rasterise(oblong, turn(0.0), 12.0, (2.0, 40.0), 100)
    assert sprite is not None
    assert sprite.box_xyxy_px == pytest.approx((0, 37, 8, 43), abs=0.25)
    assert sprite.visible_share == pytest.approx(8 / 12, abs=0.03)
    assert rasterise(oblong, turn(0.0), 12.0, (-20.0, 40.0), 100) is None


def test_ignore_regions_hold_no_labelled_object(scenes):
    regions = 0
    for scene, instances in scenes:
        for x0, y0, x1, y1 in scene.ignore_xyxy_px.astype(int):
            regions += 1
            assert not instances[y0:y1, x0:x1].any()
    assert regions >= 5


def test_classes_are_those_of_the_card_and_balanced(scenes):
    card = DatasetCard.model_validate(yaml.safe_load((CATALOG / "sample-aerial.yaml").read_text(encoding="utf-8")))
    order = {"vehicle": VEHICLE, "person": PERSON, "boat": BOAT, "bicycle": BICYCLE}
    assert {name: label for label, name in enumerate(card.classes)} == order
    shares = np.bincount(np.concatenate([scene.labels for scene, _ in scenes]), minlength=4) / sum(
        len(scene.labels) for scene, _ in scenes
    )
    assert shares.min() >= 0.15
    assert shares.max() <= 0.40


def test_at_least_three_in_ten_objects_differ_by_less_than_20_grey_levels(scenes):
    low = total = 0
    for scene, instances in scenes:
        grey = scene.image_bgr @ np.array([0.114, 0.587, 0.299])
        for row in range(len(scene.labels)):
            own = instances == row + 1
            ring = cv2.dilate(own.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool) & (instances == 0)
            low += abs(grey[own].mean() - grey[ring].mean()) < 20
            total += 1
    assert low / total >= 0.30


def _ap50(scenes: list[Scene], detections: list[dict[str, object]]) -> float:
    """AP50 by pycocotools; all objects are one category, which is to give the detector their class for nothing."""
    boxes = [(image_id, *box) for image_id, scene in enumerate(scenes) for box in scene.boxes_xyxy_px.tolist()]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in range(len(scenes))],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 1, "bbox": [x, y, X - x, Y - y], "area": 1, "iscrowd": 0}
            for k, (i, x, y, X, Y) in enumerate(boxes, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e9]], ["all"]
        evaluation.params.maxDets = [1000]
        evaluation.evaluate()
        evaluation.accumulate()
    return float(evaluation.eval["precision"].mean())


def test_a_threshold_does_not_find_the_objects(scenes):
    pictures = [scene for scene, _ in scenes[::3]][:40]
    found: dict[tuple[int, int], list[dict[str, object]]] = {}
    for image_id, scene in enumerate(pictures):
        grey = cv2.cvtColor(scene.image_bgr, cv2.COLOR_BGR2GRAY)
        for window in (21, 41):
            difference = cv2.absdiff(grey, cv2.medianBlur(grey, window))
            for threshold in (12, 18, 25, 35, 50):
                _, _, blobs, _ = cv2.connectedComponentsWithStats((difference > threshold).astype(np.uint8))
                for x, y, w, h, _ in blobs[1:].tolist():
                    if 4 <= max(w, h) <= 24:
                        score = float(difference[y : y + h, x : x + w].mean())
                        blob = {"image_id": image_id, "category_id": 1, "bbox": [x, y, w, h], "score": score}
                        found.setdefault((window, threshold), []).append(blob)
    assert max(_ap50(pictures, blobs) for blobs in found.values()) < 0.2


def test_the_scoring_above_would_reward_a_detector_that_finds_them(scenes):
    pictures = [scene for scene, _ in scenes[:5]]
    perfect = [
        {"image_id": i, "category_id": 1, "bbox": [x, y, X - x, Y - y], "score": 0.9}
        for i, scene in enumerate(pictures)
        for x, y, X, Y in scene.boxes_xyxy_px.tolist()
    ]
    assert _ap50(pictures, perfect) == pytest.approx(1.0)


def test_unknown_splits_indices_and_settings_are_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"UnknownSplit: 'dev' is not known. Known: train, val, test"):
        render(recipe, "dev", 0)
    with pytest.raises(IndexError, match=r"image 80 is outside split 'val'"):
        render(recipe, "val", 80)
    settings = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | {"fog": 1}), encoding="utf-8")
    with pytest.raises(InvalidDataset, match="fog"):
        load_recipe(tmp_path)

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

from data.card import load_card
from data.problems import InvalidDataset
from data.procedural import render_dataset
from data.samples import aerial, surface
from data.samples.scene import Recipe, Scene, load_recipe
from data.samples.surface import render, render_with_instances
from data.samples.surface_defects import INCLUSION, PIT, SCRATCH, STAIN, defect
from data.samples.surface_texture import Plate

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "data" / "raw" / "sample-surface"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(FOLDER)


@pytest.fixture(scope="module")
def scenes(recipe: Recipe) -> list[tuple[Scene, np.ndarray]]:
    """Every picture of val, with its instance map."""
    return [render_with_instances(recipe, "val", index) for index in range(recipe.num_images["val"])]


def _digest(scene: Scene) -> str:
    parts = (scene.image_bgr, scene.boxes_xyxy_px, scene.labels, scene.ignore_xyxy_px)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_another_process_with_another_thread_count_renders_the_same_bytes(recipe):
    code = (
        "import hashlib, sys, cv2; from pathlib import Path\n"
        "from data.samples.surface import render; from data.samples.scene import load_recipe\n"
        "cv2.setNumThreads(1); cv2.setUseOptimized(False)\n"
        "for split, index in (('test', 3), ('test', 6), ('train', 318), ('train', 2)):\n"
        "    s = render(load_recipe(Path(sys.argv[1])), split, index)\n"
        "    parts = (s.image_bgr, s.boxes_xyxy_px, s.labels, s.ignore_xyxy_px)\n"
        "    print(hashlib.sha256(b''.join(p.tobytes() for p in parts)).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    jobs = (("test", 3), ("test", 6), ("train", 318), ("train", 2))
    assert done.stdout.split() == [_digest(render(recipe, split, index)) for split, index in jobs]


def test_seed_split_and_index_each_change_the_picture(recipe):
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    pictures = [render(recipe, "val", 0), render(recipe, "val", 1), render(recipe, "test", 0), render(other, "val", 0)]
    assert all(a.image_bgr.tobytes() != b.image_bgr.tobytes() for a, b in combinations(pictures, 2))


def test_scene_has_the_promised_types(recipe, scenes):
    size = recipe.image_size_px
    for scene, _ in scenes:
        assert (scene.image_bgr.shape, scene.image_bgr.dtype) == ((size, size, 3), np.uint8)
        assert (scene.boxes_xyxy_px.shape, scene.boxes_xyxy_px.dtype) == ((len(scene.labels), 4), np.float32)
        assert (scene.labels.dtype, scene.ignore_xyxy_px.shape) == (np.int64, (0, 4))


def test_boxes_lie_inside_the_picture_and_most_are_small(recipe, scenes):
    boxes = np.concatenate([scene.boxes_xyxy_px for scene, _ in scenes])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0
    assert boxes.max() <= recipe.image_size_px
    assert sides.min() > 0
    assert sides.max(axis=1).min() >= 6
    assert sides.max(axis=1).max() <= 90
    # COCO's small.
    assert np.mean(sides.prod(axis=1) < 32**2) >= 0.7


def test_boxes_are_tight_around_the_pixels_of_their_defect(scenes):
    gaps = []
    for scene, instances in scenes:
        for row, box in enumerate(scene.boxes_xyxy_px):
            y, x = np.nonzero(instances == row + 1)
            gaps.append(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box)
    # A pixel counts as the defect's when it is covered by more than a third; the boxes are finer than that.
    assert np.abs(gaps).max() <= 2.0
    assert np.abs(np.mean(gaps, axis=0)).max() <= 0.5


@pytest.mark.parametrize("label", [SCRATCH, PIT, INCLUSION, STAIN])
def test_a_defect_changes_its_box_and_next_to_nothing_around_it(label):
    plate = Plate(np.full((256, 256, 3), 120, np.uint8), (120, 120, 120), 0.3, 1.0)
    for seed in range(20):
        item = defect(np.random.default_rng(seed), label, plate, faint=False)
        image = plate.image_bgr.copy()
        surface.lay_over(image, item, 40, 50)
        y, x = np.nonzero(np.abs(image.astype(int) - 120).max(axis=2) >= 8)
        found = np.array([x.min() - 40, y.min() - 50, x.max() + 1 - 40, y.max() + 1 - 50])
        assert np.abs(found - item.box_xyxy_px).max() <= 2


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_15_to_20_percent_of_each_split_are_flawless(recipe, split):
    num = recipe.num_images[split]
    flawless = sum(index % surface.FLAWLESS_PERIOD == surface.FLAWLESS_PERIOD - 1 for index in range(num))
    assert 0.15 <= flawless / num <= 0.20


def test_flawless_pictures_and_only_they_have_no_defect(scenes):
    for index, (scene, instances) in enumerate(scenes):
        flawless = index % surface.FLAWLESS_PERIOD == surface.FLAWLESS_PERIOD - 1
        assert (len(scene.labels) == 0) == flawless
        assert instances.any() != flawless


def test_classes_are_those_of_the_card_and_balanced(scenes):
    order = {"scratch": SCRATCH, "pit": PIT, "inclusion": INCLUSION, "stain": STAIN}
    assert {name: label for label, name in enumerate(load_card("sample-surface").classes)} == order
    counts = np.bincount(np.concatenate([scene.labels for scene, _ in scenes]), minlength=4)
    assert (counts / counts.sum()).min() >= 0.15
    assert (counts / counts.sum()).max() <= 0.40


def test_at_least_three_in_ten_defects_differ_by_less_than_20_grey_levels(scenes):
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


@pytest.mark.parametrize(
    ("conversion", "thresholds"),
    [(cv2.COLOR_BGR2GRAY, (18, 25, 35)), (cv2.COLOR_BGR2LAB, (6, 12)), (None, (18, 25, 35))],
    ids=["grey", "chroma", "colour"],
)
def test_a_threshold_does_not_find_the_defects(scenes, conversion, thresholds):
    pictures = [scene for scene, _ in scenes if len(scene.labels)]
    found: dict[tuple[int, int], list[dict[str, object]]] = {}
    for image_id, scene in enumerate(pictures):
        for smoothing in (1, 3):
            picture = cv2.medianBlur(scene.image_bgr, smoothing)
            channels = cv2.split(picture if conversion is None else cv2.cvtColor(picture, conversion))
            # Of Lab, the lightness is left out: the first test has it.
            channels = channels[1:] if conversion == cv2.COLOR_BGR2LAB else channels
            difference = np.max([cv2.absdiff(channel, cv2.medianBlur(channel, 41)) for channel in channels], axis=0)
            for threshold in thresholds:
                _, _, blobs, _ = cv2.connectedComponentsWithStats((difference > threshold).astype(np.uint8))
                for x, y, w, h, _ in blobs[1:].tolist():
                    if 6 <= max(w, h) <= 92:
                        score = float(difference[y : y + h, x : x + w].mean())
                        blob = {"image_id": image_id, "category_id": 1, "bbox": [x, y, w, h], "score": score}
                        found.setdefault((smoothing, threshold), []).append(blob)
    assert max(_ap50(pictures, blobs) for blobs in found.values()) < 0.2


def test_the_scoring_above_would_reward_a_detector_that_finds_them(scenes):
    pictures = [scene for scene, _ in scenes[:5]]
    perfect = [
        {"image_id": i, "category_id": 1, "bbox": [x, y, X - x, Y - y], "score": 0.9}
        for i, scene in enumerate(pictures)
        for x, y, X, Y in scene.boxes_xyxy_px.tolist()
    ]
    assert _ap50(pictures, perfect) == pytest.approx(1.0)


def test_the_recipe_chooses_what_is_rendered_whatever_the_name_of_the_dataset(recipe, tmp_path):
    card = load_card("sample-aerial")
    for scenes, renderer in (("surface", surface), ("aerial", aerial)):
        small = recipe.model_copy(update={"scenes": scenes, "num_images": {"train": 0, "val": 0, "test": 1}})
        raw, images = tmp_path / scenes, tmp_path / scenes / "images"
        images.mkdir(parents=True)
        (raw / "recipe.yaml").write_text(yaml.safe_dump(small.model_dump()), encoding="utf-8")
        (record,) = render_dataset(card, raw, images)["test"].images
        expected = renderer.render(small, "test", 0)
        assert [box.label for box in record.boxes] == expected.labels.tolist()
        written = cv2.imread(str(images / record.file_name)).astype(int)
        assert np.abs(written - expected.image_bgr).mean() < 6


def test_recipes_with_faults_are_refused_and_every_fault_is_named(tmp_path):
    settings = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    del settings["seed"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | {"scenes": "moon"}), encoding="utf-8")
    with pytest.raises(InvalidDataset) as refusal:
        load_recipe(tmp_path)
    assert "scenes: Input should be 'aerial' or 'surface', got 'moon'" in str(refusal.value)
    assert "seed: Field required" in str(refusal.value)

"""Pictures are checked by what must be visible in them: size, colours, marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pixels import pixels_of

from data.colours import PALETTE, class_colour
from data.decode import UndecodableImage
from evaluation.contact_sheet import predictions_page


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four grey pictures of 160 x 160 px and a large one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(1, 5):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((160, 160, 3), 90, dtype=np.uint8))
    cv2.imwrite(str(folder / "5.png"), np.full((900, 1600, 3), 90, dtype=np.uint8))
    return folder


def truth(*boxes: tuple[int, int, list[float]], image_ids: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in image_ids],
        "categories": [{"id": c, "name": f"class-{c}"} for c in range(1, 4)],
        "annotations": [{"image_id": i, "category_id": c, "bbox": bbox} for i, c, bbox in boxes],
    }


def found(image_id: int, category_id: int, bbox: list[float], score: float = 0.9) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def draw(images: Path, ground_truth: dict[str, Any], detections: list[dict[str, Any]], **options: Any) -> Path:
    path = images.parent / f"page-{len(list(images.parent.glob('page-*')))}.png"
    predictions_page(images, ground_truth, detections, path, ignore_rule="covered-half", **options)
    return path


def test_colours_differ_between_neighbouring_classes() -> None:
    assert len(set(PALETTE)) == len(PALETTE) >= 7
    assert class_colour(0) != class_colour(1) != class_colour(2)
    assert class_colour(len(PALETTE)) == class_colour(0)


def test_page_shows_boxes_in_their_class_colour_and_marks_errors(images: Path) -> None:
    scene = truth((1, 2, [50, 50, 40, 40]))
    hit = draw(images, scene, [found(1, 2, [50, 50, 40, 40])])
    assert draw(images, scene, [found(1, 2, [50, 50, 40, 40])]).read_bytes() == hit.read_bytes()
    missed = draw(images, scene, [])
    wrong = draw(images, scene, [found(1, 2, [50, 50, 40, 40]), found(1, 3, [110, 110, 30, 30])])
    # The box of 40 px is drawn on both sides at three times its size; beyond it the colour is in the legend.
    solid = pixels_of(hit, class_colour(1)) - pixels_of(draw(images, truth(), []), class_colour(1))
    assert solid >= 2 * 4 * 40 * 3
    assert pixels_of(missed, class_colour(1)) < pixels_of(hit, class_colour(1)) - solid / 2
    assert pixels_of(wrong, class_colour(2)) > pixels_of(hit, class_colour(2)) + 100
    # Errors carry white marks; neither the grey pictures nor the boxes have white in them.
    assert white_inside(hit) == 0
    assert white_inside(missed) > 10
    assert white_inside(wrong) > 10


def white_inside(path: Path) -> int:
    """White pixels in the two first panels, which are 480 px wide and high for a picture of 160."""
    page = cv2.imread(str(path))
    panels = [page[160:630, left + 5 : left + 470] for left in (16, 16 + 640 + 16)]
    return sum(int((panel.min(axis=2) > 240).sum()) for panel in panels)


def test_detections_below_the_threshold_are_not_drawn(images: Path) -> None:
    scene, weak = truth((1, 1, [20, 20, 30, 30])), found(1, 3, [110, 110, 30, 30], 0.4)
    drawn = [
        pixels_of(draw(images, scene, detections, score_threshold=threshold), class_colour(2))
        for detections, threshold in (([], 0.5), ([weak], 0.5), ([weak], 0.3))
    ]
    assert drawn[0] == drawn[1] < drawn[2]


def test_boxes_in_ignore_regions_are_grey(images: Path) -> None:
    scene = truth((1, 1, [20, 20, 30, 30]), (1, 3, [110, 110, 30, 30]))
    plain = pixels_of(draw(images, scene, []), class_colour(2))
    scene["images"][0]["ignore_regions_xywh"] = [[100, 100, 50, 50]]
    ignored = draw(images, scene, [])
    assert pixels_of(ignored, class_colour(2)) < plain
    # Darkened by a hatched region.
    assert cv2.imread(str(ignored))[160:630, 16:490].min() < 90


def test_images_are_spread_from_best_to_worst(images: Path) -> None:
    box = [50.0, 50.0, 40.0, 40.0]
    scene = truth((1, 1, box), (2, 2, box), (3, 3, box), image_ids=(1, 2, 3, 4))
    detections = [found(1, 1, box), found(1, 1, [0, 0, 20, 20]), found(2, 2, box)]
    page = draw(images, scene, detections)
    # Of F1 2/3, 1 and 0 the best and the worst are shown: image 2 and image 3. Image 4 has nothing to show.
    two = draw(images, scene, detections, num_images=2)
    assert pixels_of(two, class_colour(0)) < pixels_of(page, class_colour(0))
    assert pixels_of(two, class_colour(1)) == pixels_of(page, class_colour(1))
    assert pixels_of(two, class_colour(2)) == pixels_of(page, class_colour(2))


def test_window_of_a_large_image_holds_the_errors(images: Path) -> None:
    scene = truth((5, 1, [20, 20, 10, 10]), (5, 2, [1500, 800, 10, 10]), (5, 2, [1480, 800, 10, 10]), image_ids=(5,))
    page = draw(images, scene, [found(5, 1, [20, 20, 10, 10])])
    empty = draw(images, truth(image_ids=(5,)), [])
    assert pixels_of(page, class_colour(1)) > pixels_of(empty, class_colour(1))
    assert pixels_of(page, class_colour(0)) == pixels_of(empty, class_colour(0))
    assert cv2.imread(str(page)).shape[1] == 2 * 640 + 3 * 16


def test_a_missing_image_is_named(images: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"9\.png"):
        draw(images, truth((9, 1, [0, 0, 5, 5]), image_ids=(9,)), [])


def test_a_damaged_image_is_named(images: Path) -> None:
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
    with pytest.raises(UndecodableImage, match=r"1\.png"):
        draw(images, truth((1, 1, [0, 0, 5, 5])), [])


def test_boxes_are_drawn_on_the_pixels_as_stored(images: Path) -> None:
    """A viewer would turn this picture; the boxes are in the frame of its file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pages = []
    for options in ({}, {"exif": exif}):
        Image.new("RGB", (160, 100), "gray").save(images / "1.png", **options)
        pages.append(draw(images, truth((1, 1, [100, 20, 30, 30])), []).read_bytes())
    assert pages[0] == pages[1]

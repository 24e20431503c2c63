from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.augment import letterbox as training_letterbox
from tracking.packaging import digest
from tracking.predictor import Predictor, letterbox


def test_the_digest_sees_content_names_and_places_but_not_times(files: Path) -> None:
    original = digest(files)
    os.utime(files / "spec.json", (1, 1))
    assert digest(files) == original
    (files / "spec.json").write_text("[]")
    changed = digest(files)
    (files / "spec.json").write_text("{}")
    assert digest(files) == original
    (files / "spec.json").rename(files / "spic.json")
    renamed = digest(files)
    (files / "spic.json").rename(files / "plots" / "spec.json")
    moved = digest(files)
    (files / "plots" / "spec.json").rename(files / "spec.json")
    (files / "extra").touch()
    assert len({original, changed, renamed, moved, digest(files)}) == 5


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 100), (33, 20), (200, 1), (97, 301)])
def test_a_served_image_is_letterboxed_as_in_training(size_hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    served, served_scale = letterbox(image, 64)
    trained, trained_scale = training_letterbox(image, 64)
    assert served_scale == trained_scale
    np.testing.assert_array_equal(served, trained)


@pytest.mark.parametrize("image", ["not base64!", b"not an image", "", None])
def test_a_row_that_is_no_image_is_named(image: object) -> None:
    pandas = pytest.importorskip("pandas")
    good = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    predictor = Predictor()
    predictor._detect = lambda _: []
    assert predictor.predict(pandas.DataFrame({"image": [good]})) == [[]]
    with pytest.raises(ValueError, match="row 1"):
        predictor.predict(pandas.DataFrame({"image": [good, image]}))

from __future__ import annotations

import base64
import os
from pathlib import Path

import cv2
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from data.augment import fit_hw
from data.augment import letterbox as training_letterbox
from data.tiling import TileGrid
from tracking.packaging import digest
from tracking.predictor import Predictor, letterbox, windows_xyxy_px


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
    served = letterbox(image, 64)
    trained, trained_scale = training_letterbox(image, 64)
    assert (served.scale, served.width_px) == (trained_scale, fit_hw(*size_hw, 64)[1])
    np.testing.assert_array_equal(served.square, trained)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(32, 200), st.integers(0, 100))
def test_a_served_image_is_cut_into_the_tiles_of_evaluation(
    width_px: int, height_px: int, size_px: int, overlap_px: int
) -> None:
    grid = TileGrid(size_px=size_px, overlap_px=min(overlap_px, size_px // 2))
    expected = [(x, y, x + width, y + height) for x, y, width, height in grid.tiles(width_px, height_px)]
    assert windows_xyxy_px(width_px, height_px, grid.model_dump()) == expected
    assert windows_xyxy_px(width_px, height_px, None) == [(0, 0, width_px, height_px)]


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("not base64!", "base64"), ("bm90IGFuIGltYWdl", "12 bytes"), (b"not an image", "12 bytes"), ("", "0 bytes"),
        (cv2.imencode(".bmp", np.zeros((1, 1, 3), np.uint8))[1].tobytes(), "no JPEG or PNG"),
        (b"\xff\xd8\xff and no more", "not a readable JPEG"),
        (None, "not NoneType"), (float("nan"), "not float"), (7, "not int"), (["a"], "not list"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_image_is_named_and_the_client_s_fault(image: object, told: str) -> None:
    good = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    predictor = Predictor()
    predictor._detect = lambda _: []
    broken_lines = base64.encodebytes(good).decode()
    assert predictor.predict(pandas.DataFrame({"image": [good, broken_lines]})) == [[], []]
    with pytest.raises(MlflowException, match=f"row 1: .*{told}") as refused:
        predictor.predict(pandas.DataFrame({"image": pandas.Series([good, image], dtype=object)}))
    assert refused.value.get_http_status_code() == 400


def test_an_input_without_the_column_is_the_client_s_fault() -> None:
    with pytest.raises(MlflowException, match="no column 'image'"):
        Predictor().predict(pandas.DataFrame({"picture": ["a"]}))

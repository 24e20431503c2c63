from __future__ import annotations

import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.duplicates import MAX_DISTANCE, Duplicates, near_duplicate_problems, near_duplicates, neighbours, repetitions
from data.headers import MAX_BYTES
from data.records import ImageRecord, Split

SHARED = Path(os.environ.get("SPECK_SHARED_DATASETS", Path(__file__).parents[4] / "shared" / "datasets"))
Pixels = Any


def texture(seed: int, side: int = 128) -> Pixels:
    """Blobs of several sizes around a middle grey."""
    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.normal(0, 1, (cells, cells)), (side, side), interpolation=cv2.INTER_CUBIC)
        for cells in (4, 8, 16, 32)
    ]
    return (128 + 30 * sum(layers)).clip(0, 255).astype(np.uint8)


def write(folder: Path, pictures: dict[str, Pixels]) -> Duplicates:
    for name, pixels in pictures.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        assert cv2.imwrite(str(folder / name), pixels)
    return near_duplicates(folder, list(pictures))


def brute_force(codes: Any) -> set[tuple[int, int]]:
    numbers = [int(code) for code in codes]
    return {
        (i, j)
        for i in range(len(numbers))
        for j in range(i + 1, len(numbers))
        if (numbers[i] ^ numbers[j]).bit_count() <= MAX_DISTANCE
    }


def pairs(codes: Any) -> set[tuple[int, int]]:
    return {(row, other) for row, near in neighbours(np.array(codes, np.uint64)) for other in near.tolist()}


@given(st.lists(st.integers(0, 2**64 - 1), max_size=6), st.data())
def test_neighbours_are_those_of_brute_force(seeds: list[int], data: st.DataObject) -> None:
    """Around each seed lie codes at every distance near the limit: at random none would be near another."""
    codes = list(seeds)
    for seed in seeds:
        bits = data.draw(st.lists(st.integers(0, 63), unique=True, min_size=10, max_size=10))
        codes += [seed ^ sum(1 << bit for bit in bits[:count]) for count in (0, 1, 3, 6, 7, 8, 10)]
    assert pairs(codes) == brute_force(codes)


def test_every_way_to_spread_seven_bits_is_found() -> None:
    """Each split of 7 differing bits over the four quarters, the worst case of the search."""
    base = 0x0123_4567_89AB_CDEF
    spread = [
        (a, b, c, 7 - a - b - c) for a in range(8) for b in range(8 - a) for c in range(8 - a - b)
    ]  # fmt: skip
    for counts in spread:
        flips = sum(1 << (16 * quarter + bit) for quarter, count in enumerate(counts) for bit in range(count))
        assert pairs([base, base ^ flips]) == {(0, 1)}
    assert len(spread) == 120


def test_many_equal_codes_and_none() -> None:
    assert len(pairs([5] * 40)) == 40 * 39 // 2
    assert pairs([]) == set()


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "half": lambda pixels: cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "dim": lambda pixels: cv2.convertScaleAbs(pixels, alpha=0.7, beta=10),
    "noise": lambda pixels: (pixels + np.random.default_rng(1).normal(0, 5, pixels.shape)).clip(0, 255),
    "colour": lambda pixels: cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_among_strangers(tmp_path: Path, change: str) -> None:
    pictures = {f"{seed}.png": texture(seed) for seed in range(12)}
    found = write(tmp_path, pictures | {f"copy-{seed}.png": CHANGES[change](texture(seed)) for seed in range(12)})
    assert sorted(found.groups) == sorted((f"{seed}.png", f"copy-{seed}.png") for seed in range(12))
    assert all(link.distance_bits <= MAX_DISTANCE and not link.same_bytes for link in found.links)


def test_a_jpeg_of_low_quality_is_its_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(cv2.imencode(".jpg", texture(0), (cv2.IMWRITE_JPEG_QUALITY, 50))[1].tobytes())
    cv2.imwrite(str(tmp_path / "a.png"), texture(0))
    assert near_duplicates(tmp_path, ["a.jpg", "a.png"]).groups == [("a.jpg", "a.png")]


def test_pictures_without_contrast_match_by_bytes_alone(tmp_path: Path) -> None:
    """Black, grey and a mere gradient of light: correlation means nothing there."""
    gradient = np.tile(np.linspace(40, 90, 128), (128, 1))
    blank = {f"black-{side}.png": np.zeros((side, side), np.uint8) for side in (64, 128)}
    blank |= {f"grey-{level}.png": np.full((128, 128), level, np.uint8) for level in (60, 61)}
    found = write(
        tmp_path, blank | {"soft.png": gradient, "softer.png": gradient * 0.9, "again.png": blank["grey-60.png"]}
    )
    assert found.groups == [("grey-60.png", "again.png")]
    assert found.links[0].same_bytes


def test_a_common_lamp_does_not_make_pictures_alike(tmp_path: Path) -> None:
    """A strong gradient over faint textures of their own: plain correlation is above 0.98."""
    lamp = 60 + 120 * np.add.outer(np.linspace(0, 0.5, 128), np.linspace(0, 0.5, 128))
    pictures = {f"{seed}.png": lamp + 0.05 * texture(seed) for seed in range(20)}
    plain = np.corrcoef([pixels.ravel() for pixels in pictures.values()])
    assert plain.min() > 0.98
    assert write(tmp_path, pictures).groups == []


def test_likeness_is_passed_on_and_links_are_one_fewer_than_members(tmp_path: Path) -> None:
    """A window that moves over a scene: far frames differ, their neighbours do not."""
    scene = cv2.resize(texture(3, 256), (1024, 1024), interpolation=cv2.INTER_CUBIC)
    frames = {f"{step}.png": scene[:, 5 * step : 5 * step + 512] for step in range(30)}
    found = write(tmp_path, frames)
    assert found.groups == [tuple(frames)]
    assert len(found.links) == 29
    assert near_duplicates(tmp_path, ["0.png", "29.png"]).groups == []


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    write(tmp_path, {"a.png": texture(0)})
    found = near_duplicates(tmp_path, ["empty.png", "a.png", "text.png", "gone.png"])
    assert found == ([], [], ["empty.png", "text.png", "gone.png"])


def test_a_group_over_several_splits_is_one_warning(tmp_path: Path) -> None:
    pictures = {"train/a.png": texture(0), "train/b.png": CHANGES["dim"](texture(0)), "train/c.png": texture(1)}
    pictures |= {"val/a.png": CHANGES["half"](texture(0)), "val/b.png": texture(2), "test/a.png": texture(1)}
    write(tmp_path, pictures)
    splits = {
        split: Split([ImageRecord(1, name, 1, 1, (), ()) for name in pictures if name.startswith(split)])
        for split in ("train", "val", "test")
    }
    (problem,) = near_duplicate_problems(tmp_path, splits)
    assert (problem.path, problem.severity) == (tmp_path / "val/a.png", "warning")
    assert problem.rule.startswith("leak: split 'val' holds nearly the same picture as 'train/")
    assert problem.rule.endswith("3 such pictures lie in train 2, val 1")


def test_neu_det_has_its_published_copy_and_a_plate_taken_twice() -> None:
    folder = SHARED / "neu_det" / "images"
    if not folder.is_dir():
        pytest.skip(f"needs NEU-DET in {SHARED}: set SPECK_SHARED_DATASETS")
    found = near_duplicates(folder, sorted(path.name for path in folder.iterdir()))
    assert {frozenset(link[:2]): link.same_bytes for link in found.links} == {
        frozenset({"patches_101.jpg", "patches_105.jpg"}): True,
        frozenset({"pitted_surface_171.jpg", "pitted_surface_292.jpg"}): False,
    }


def test_aerial_frames_are_grouped_within_their_video() -> None:
    folder = SHARED / "aerial_cars"
    if not folder.is_dir():
        pytest.skip(f"needs aerial_cars in {SHARED}: set SPECK_SHARED_DATASETS")
    names = sorted(path.name for path in folder.glob("*.jpg"))
    found = near_duplicates(folder, names)
    assert len(names) == 36
    videos = [{name.rpartition("-")[0] for name in group} for group in found.groups]
    assert all(len(names) == 1 for names in videos)
    assert sum(len(group) for group in found.groups) == 28


@pytest.mark.soak
def test_ten_thousand_frames_of_a_fixed_camera_are_one_group(tmp_path: Path) -> None:
    """The worst case: every pair is alike. It must end, and without a list of 50 million pairs."""
    encoded = [cv2.imencode(".png", texture(0, 64) + np.uint8(step))[1].tobytes() for step in range(4)]
    names = [f"{number}.png" for number in range(10_000)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded[number % 4])
    found = near_duplicates(tmp_path, names)
    assert [len(group) for group in found.groups] == [10_000]
    assert len(found.links) == 9_999


def test_what_must_not_be_read_is_not(tmp_path: Path) -> None:
    """A bomb of a megabyte, a picture of more than a gigabyte and a link out of the folder are left to other checks."""
    outside = tmp_path / "outside.png"
    folder = tmp_path / "images"
    write(folder, {"a.png": texture(0), "long.png": texture(0)})
    outside.write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(outside)
    os.truncate(folder / "long.png", MAX_BYTES + 1)
    row = b"\0" + b"\x7f" * 32_000
    content = zlib.compressobj(9)
    packed = b"".join(content.compress(row) for _ in range(32_000)) + content.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 32_000, 32_000, 8, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b"")]
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    )
    names = ["a.png", "long.png", "link.png", "bomb.png"]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert near_duplicates(folder, names).unreadable == names[1:]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100 * 1024


def test_pictures_that_are_all_alike_are_one_group(tmp_path: Path) -> None:
    pictures = {f"{number}.png": cv2.add(texture(1) // 2, number) for number in range(100)}
    found = write(tmp_path, pictures)
    assert [len(group) for group in found.groups] == [100]
    split_of = {name: "test" if number < 10 else "train" for number, name in enumerate(pictures)}
    assert repetitions(tmp_path, split_of, 0) == dict.fromkeys([*pictures][10:], "0.png")
    assert repetitions(tmp_path, split_of, 100) == {}

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import Image
from data.image_cache import ImageCache, picture_folder

SIZES = [(4, 6), (1, 1), (5, 3), (8, 8)]


def _pictures() -> list[Image]:
    return [np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8) for index, size in enumerate(SIZES)]


def _open(path: Path | None) -> ImageCache:
    return ImageCache(SIZES, max_bytes=10_000, path=path)


def _filled(path: Path) -> list[Image]:
    cache, pictures = _open(path), _pictures()
    for index, picture in enumerate(pictures):
        cache.put(index, picture)
    return pictures


def _missing(cache: ImageCache) -> list[int]:
    return [index for index in range(len(SIZES)) if cache.get(index) is None]


@pytest.mark.parametrize("name", [None, "deep/er/file.bin"])
def test_what_was_put_is_there_and_cannot_be_written_to(name: str | None, tmp_path: Path) -> None:
    cache = _open(tmp_path / name if name else None)
    assert _missing(cache) == [0, 1, 2, 3]
    for index in (2, 0):
        cache.put(index, _pictures()[index])
    assert _missing(cache) == [1, 3]
    for index in (2, 0):
        kept = cache.get(index)
        assert kept is not None
        np.testing.assert_array_equal(kept, _pictures()[index])
        with pytest.raises(ValueError, match="read-only"):
            kept[0, 0, 0] = 0


@given(st.integers(0, 400))
def test_memory_holds_what_fits_and_a_file_holds_all(max_bytes: int) -> None:
    cache = ImageCache(SIZES, max_bytes=max_bytes)
    for index, picture in enumerate(_pictures()):
        cache.put(index, picture)
    kept = [index for index in range(len(SIZES)) if index not in _missing(cache)]
    assert kept == list(range(len(kept)))
    assert sum(_pictures()[index].nbytes for index in kept) <= max_bytes
    assert len(kept) == len(SIZES) or sum(_pictures()[index].nbytes for index in range(len(kept) + 1)) > max_bytes


def test_a_file_ignores_the_limit_of_memory(tmp_path: Path) -> None:
    cache = ImageCache(SIZES, max_bytes=0, path=tmp_path / "file")
    assert cache.num_kept == len(SIZES)


def test_a_later_run_finds_what_an_earlier_one_left(tmp_path: Path) -> None:
    pictures = _filled(tmp_path / "file")
    again = _open(tmp_path / "file")
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(again.get(index), picture)


@settings(max_examples=60)
@given(st.data())
def test_one_flipped_bit_hides_one_picture_until_it_is_put_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cache") / "file"
    pictures = _filled(path)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    ends = np.cumsum([picture.nbytes for picture in pictures]) + 8 * len(pictures)
    hit = position // 8 if position < 8 * len(pictures) else int(np.searchsorted(ends, position, side="right"))
    cache = _open(path)
    assert _missing(cache) == [hit]
    cache.put(hit, pictures[hit])
    np.testing.assert_array_equal(cache.get(hit), pictures[hit])
    assert _missing(_open(path)) == []


@pytest.mark.parametrize("size", [0, 7, 110, 10_000])
def test_a_file_of_another_length_is_mended(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    pictures = _filled(path)
    whole = path.stat().st_size
    os.truncate(path, size)
    cache = _open(path)
    assert path.stat().st_size == whole
    for index, picture in enumerate(pictures):
        kept = cache.get(index)
        assert kept is None or np.array_equal(kept, picture)
    # The entries take 32 bytes, the first two pictures 72 and 3.
    assert len(_missing(cache)) == {0: 4, 7: 4, 110: 2, 10_000: 0}[size]
    _filled(path)
    assert _missing(_open(path)) == []


def _in_forked_processes(number: int, work: Callable[[int], object]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(index,)) for index in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize("name", [None, "file"])
def test_forked_processes_share_one_memory(name: str | None, tmp_path: Path) -> None:
    """What a loader process decodes, this one and the other processes find."""
    cache = _open(tmp_path / name if name else None)
    _in_forked_processes(2, lambda index: cache.put(index, _pictures()[index]))
    assert _missing(cache) == [2, 3]
    np.testing.assert_array_equal(cache.get(1), _pictures()[1])


def test_processes_that_fill_a_file_at_once_see_whole_pictures_or_none(tmp_path: Path) -> None:
    sizes = [(64, 64)] * 40
    pictures = [np.full((64, 64, 3), index, np.uint8) for index in range(40)]

    def fill(process: int) -> None:
        cache = ImageCache(sizes, max_bytes=0, path=tmp_path / "file")
        for index in np.random.default_rng(process).permutation(40).tolist() * 2:
            kept = cache.get(index)
            if kept is None:
                cache.put(index, pictures[index])
            else:
                assert (kept == index).all()

    _in_forked_processes(4, fill)
    cache = ImageCache(sizes, max_bytes=0, path=tmp_path / "file")
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(cache.get(index), picture)


def test_a_full_disk_is_a_warning_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _open(tmp_path / "file")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(RuntimeWarning, match=r"file: cannot keep decoded pictures \(No space left.*Free disk space"):
        cache.put(0, _pictures()[0])
    assert cache.get(0) is None


def test_half_a_write_leaves_the_picture_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _open(tmp_path / "file")
    write = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, content, place: write(fd, bytes(content)[: len(content) // 2], place))
        cache.put(0, _pictures()[0])
    assert _missing(cache) == [0, 1, 2, 3]


def test_a_deleted_file_stays_readable_to_who_has_it_open(tmp_path: Path) -> None:
    pictures = _filled(tmp_path / "file")
    cache = _open(tmp_path / "file")
    (tmp_path / "file").unlink()
    np.testing.assert_array_equal(cache.get(3), pictures[3])
    assert _missing(_open(tmp_path / "file")) == [0, 1, 2, 3]


def test_no_memory_and_no_pictures(tmp_path: Path) -> None:
    assert ImageCache([], max_bytes=10).num_kept == 0
    cache = ImageCache(SIZES, max_bytes=0)
    cache.put(0, _pictures()[0])
    assert cache.get(0) is None


def test_file_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _open(None).put(0, _pictures()[0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_pictures_lie_beside_the_datasets_of_a_store(tmp_path: Path) -> None:
    assert picture_folder(tmp_path, "a" * 32) == tmp_path / ".pictures" / ("a" * 32)

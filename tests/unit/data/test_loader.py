from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.decode import TooManyUnreadable, UndecodableImage, read_bgr
from data.loader import (
    AugmentConfig,
    Batch,
    DetectionDataset,
    GlobalBatchSampler,
    Sample,
    collate,
    init_worker,
)
from data.prepare import prepare

Make = Callable[..., Path]
NO_JOIN = AugmentConfig(mosaic_probability=0, flip_probability=0, hue_gain=0, saturation_gain=0, value_gain=0)
TENSORS = ("boxes_xyxy_px", "labels", "ignore_xyxy_px")


@pytest.fixture
def root(coco_folder: Make, make_repo: Make) -> Path:
    return prepare("tiny", make_repo(coco_folder()))


@pytest.fixture
def large_root(coco_folder: Make, make_repo: Make) -> Path:
    """Eleven train images of several sizes, one of them without a box."""

    def add(split: str, document: dict[str, Any]) -> None:
        for number in range(20, 29):
            name = f"{split}/{number}.png"
            document["images"].append({"id": number, "file_name": name, "width": 40 + number, "height": 40})
            box = {"id": number, "image_id": number, "category_id": 10, "bbox": [number, 8, 9, 5]}
            document["annotations"] += [box] if number < 28 else []

    source = coco_folder(add)
    for seed, split in enumerate(("train", "val", "test")):
        for number in range(20, 29):
            image = np.random.default_rng((seed, number)).integers(0, 256, (40, 40 + number, 3), np.uint8)
            cv2.imwrite(str(source / f"images/{split}/{number}.png"), image)
    return prepare("tiny", make_repo(source))


def _dataset(root: Path, augment: AugmentConfig | None = None, **options: Any) -> DetectionDataset:
    return DetectionDataset(root, "train", **{"input_size_px": 60, "augment": augment, "seed": 5} | options)


def _loader(dataset: DetectionDataset, sampler: GlobalBatchSampler, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=init_worker if num_workers else None,
    )


def _assert_equal(left: Sample | Batch, right: Sample | Batch) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_plain_sample_is_the_letterboxed_picture(root: Path) -> None:
    sample = _dataset(root)[1]
    image = cv2.imread(str(root / "images/train/b.png"))
    assert (sample.image_id, sample.scale, sample.original_hw) == (7, 1.0, (40, 60))
    assert (sample.image.shape, sample.image.dtype) == ((3, 60, 60), torch.uint8)
    np.testing.assert_array_equal(sample.image[:, :40].permute(1, 2, 0), image)
    assert (sample.image[:, 40:] == 114).all()
    assert sample.boxes_xyxy_px.tolist() == [[10, 5, 18, 11]]
    assert sample.labels.tolist() == [1]
    assert sample.ignore_xyxy_px.tolist() == [[30, 20, 50, 35]]  # the crowd box


def test_boxes_follow_the_scale_and_small_ones_are_counted(root: Path) -> None:
    dataset = _dataset(root, input_size_px=20)
    sample = dataset[0]
    assert sample.scale == pytest.approx(1 / 3)
    np.testing.assert_allclose(sample.boxes_xyxy_px * 3, [[1.25, 2.5, 11.25, 6.5]], atol=1e-4)
    np.testing.assert_allclose(sample.ignore_xyxy_px * 3, [[0, 0, 9, 5]], atol=1e-4)
    assert dataset.num_boxes_too_small == 1  # the 3x3 px boat is 1 px a side
    assert _dataset(root).num_boxes_too_small == 0


def test_samples_do_not_share_memory_with_the_dataset(root: Path) -> None:
    dataset = _dataset(root)
    before = dataset[0]
    spoilt = dataset[0]
    for name in ("image", *TENSORS):
        getattr(spoilt, name).zero_()
    _assert_equal(dataset[0], before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("num_workers", "cached"), [(0, "memory"), (1, "file"), (3, "file"), (3, "memory")])
def test_batches_do_not_depend_on_loader_processes(
    large_root: Path, tmp_path: Path, num_workers: int, cached: str
) -> None:
    """Two epochs through persistent workers equal samples drawn one by one in this process."""
    everything = AugmentConfig(
        mosaic_probability=0.5, affine_probability=0.5, rotation_degrees=20, shear_degrees=5, mixup_probability=0.3,
        copy_paste_probability=0.5,
    )  # fmt: skip
    cache: dict[str, Any] = {"cache_bytes": 0, "cache_folder": tmp_path / "cache"} if cached == "file" else {}
    dataset = _dataset(large_root, everything, repeat_threshold=1, **cache)
    sampler = GlobalBatchSampler(
        len(dataset), global_batch=4, rank=0, world_size=1, seed=1, repeat_factors=dataset.repeat_factors
    )
    loader = _loader(dataset, sampler, num_workers)
    reference = _dataset(large_root, everything, repeat_threshold=1, cache_bytes=0)
    seen = []
    for epoch, joins in ((0, True), (1, True), (1, False)):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch, joins=joins)
        reference.set_epoch(epoch, joins=joins)
        batches = list(loader)
        assert len(batches) == len(sampler) > 11 // 4
        for batch, indices in zip(batches, sampler, strict=True):
            _assert_equal(batch, collate([reference[index] for index in indices]))
            assert batch.images.dtype == torch.uint8
        seen.append(torch.cat([batch.images for batch in batches]))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("world_size", [1, 2])
def test_epoch_and_step_are_enough_to_resume(large_root: Path, world_size: int) -> None:
    """A new process that skips the first steps goes on with the batches of one that was never stopped."""
    whole = list(_loader_at(large_root, epoch=3, first_step=0))
    rest = [
        list(_loader_at(large_root, epoch=3, first_step=2, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert len(whole) == 5
    for expected, shares in zip(whole[2:], zip(*rest, strict=True), strict=True):
        assert torch.equal(expected.images, torch.cat([share.images for share in shares]))
        assert torch.equal(expected.boxes_xyxy_px, torch.cat([share.boxes_xyxy_px for share in shares]))


def _loader_at(root: Path, *, epoch: int, first_step: int, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
    dataset = _dataset(root, AugmentConfig())
    sampler = GlobalBatchSampler(len(dataset), global_batch=2, rank=rank, world_size=world_size, seed=1)
    dataset.set_epoch(epoch, joins=True)
    sampler.set_epoch(epoch, first_step=first_step)
    return _loader(dataset, sampler, 0)


def test_a_repeated_image_is_another_sample_of_it(large_root: Path) -> None:
    """Two of eleven images show a boat, nine a car."""
    dataset = _dataset(large_root, AugmentConfig(mosaic_probability=0), repeat_threshold=1)
    assert dataset.repeat_factors is not None
    rare = [index for index in range(len(dataset)) if 1 in dataset[index].labels]
    cars = [index for index in range(len(dataset)) if 0 in dataset[index].labels]
    assert (len(rare), len(cars)) == (2, 9)
    expected = [5.5**0.5 if index in rare else (11 / 9) ** 0.5 if index in cars else 1 for index in range(11)]
    np.testing.assert_allclose(dataset.repeat_factors, expected)
    first, again = dataset[rare[0]], dataset[rare[0] + 11]
    assert first.image_id == again.image_id
    assert not torch.equal(first.image, again.image)
    with pytest.raises(IndexError, match=r"must be in 0\.\.32"):
        dataset[33]


def test_seed_and_epoch_choose_the_augmentation(large_root: Path) -> None:
    images = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        dataset = _dataset(large_root, AugmentConfig(), seed=seed)
        dataset.set_epoch(epoch, joins=True)
        images.append(dataset[3].image)
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_without_mosaic_only_flip_and_colour_remain(root: Path) -> None:
    config = AugmentConfig(hue_gain=0, saturation_gain=0, value_gain=0)
    dataset, plain = _dataset(root, config), _dataset(root)[0]
    flips = 0
    for epoch in range(40):
        dataset.set_epoch(epoch, joins=False)
        sample = dataset[0]
        if torch.equal(sample.image, plain.image):
            _assert_equal(sample, plain)
        else:
            flips += 1
            assert torch.equal(sample.image.flip(2), plain.image)
            np.testing.assert_allclose(60 - sample.boxes_xyxy_px[:, [2, 0]], plain.boxes_xyxy_px[:, [0, 2]], atol=1e-5)
    assert 8 <= flips <= 32


def test_mosaic_probability_zero_is_no_mosaic(root: Path) -> None:
    config = AugmentConfig(mosaic_probability=0, flip_probability=0, hue_gain=0, saturation_gain=0, value_gain=0)
    _assert_equal(_dataset(root, config)[1], _dataset(root)[1])


@pytest.mark.parametrize(("cache_bytes", "num_decoded"), [(0, 15), (20_000, 14), (2**20, 11)])
def test_pictures_within_the_limit_are_decoded_once(
    large_root: Path, decoded: list[Path], cache_bytes: int, num_decoded: int
) -> None:
    """Eleven pictures of about 7,200 bytes, four of them asked for again."""
    dataset, reference = _dataset(large_root, cache_bytes=cache_bytes), _dataset(large_root, cache_bytes=0)
    samples = [(index, dataset[index]) for index in (*range(len(dataset)), 0, 2, 2, 10)]
    assert len(decoded) == num_decoded
    for index, sample in samples:
        _assert_equal(sample, reference[index])


def test_pictures_beyond_the_limit_are_decoded_once_per_node(
    large_root: Path, decoded: list[Path], tmp_path: Path
) -> None:
    """A second dataset stands for another process or a later run."""
    options = {"cache_bytes": 20_000, "cache_folder": tmp_path / "cache"}
    first = list(map(_dataset(large_root, **options).__getitem__, range(11)))
    assert len(decoded) == 11
    again = _dataset(large_root, **options)
    for index, sample in enumerate(first):
        _assert_equal(again[index], sample)
    assert len(decoded) == 11
    # Another input size is another file.
    _dataset(large_root, input_size_px=50, **options)[0]
    assert len(decoded) == 12
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_cache_is_decoded_anew(large_root: Path, decoded: list[Path], tmp_path: Path) -> None:
    options = {"cache_bytes": 0, "cache_folder": tmp_path / "cache"}
    first = [_dataset(large_root, **options)[index] for index in range(11)]
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for index, sample in enumerate(first):
        _assert_equal(_dataset(large_root, **options)[index], sample)
    assert decoded[11:] == [large_root / "images/train" / decoded[10].name]
    assert len(decoded) == 12


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, in order."""
    paths: list[Path] = []

    def read(path: Path) -> Any:
        paths.append(path)
        return read_bgr(path)

    monkeypatch.setattr("data.loader.read_bgr", read)
    return paths


def test_collate_says_which_image_a_row_belongs_to(large_root: Path) -> None:
    dataset = _dataset(large_root)
    samples = [dataset[index] for index in (10, 0, 1, 10)]
    batch = collate(samples)
    assert batch.images.shape == (4, 3, 60, 60)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.image_ids == (28, 3, 7, 28)
    assert batch.image_index.tolist() == [1, 1, 2]
    assert batch.ignore_image_index.tolist() == [1, 2]
    for position, sample in enumerate(samples):
        assert torch.equal(batch.images[position], sample.image)
        assert torch.equal(batch.boxes_xyxy_px[batch.image_index == position], sample.boxes_xyxy_px)
        assert torch.equal(batch.ignore_xyxy_px[batch.ignore_image_index == position], sample.ignore_xyxy_px)
    empty = collate([samples[0]])
    assert (empty.boxes_xyxy_px.shape, empty.image_index.shape, empty.image_index.dtype) == ((0, 4), (0,), torch.int64)


def test_damaged_or_replaced_images_are_named(root: Path) -> None:
    path = root / "images/train/a.png"
    content = path.read_bytes()
    path.write_bytes(content[:-300])
    with pytest.raises(UndecodableImage, match=r"a\.png: truncated"):
        _dataset(root)[0]
    cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UndecodableImage, match="is 8x8 px, its record says 60x40"):
        _dataset(root)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_and_counted(
    large_root: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """The last one by the first; also as a part of mosaics. What is damaged, gone or of another size is the same."""
    monkeypatch.setattr("data.loader.MAX_UNREADABLE_SHARE", 0.3)
    sound = _dataset(large_root, NO_JOIN)
    paths = [large_root / f"images/train/{name}.png" for name in ("28", "20", "21")]
    expected = [sound[index] for index in (*range(2), 4, 4, *range(4, 10), 0)]
    paths[0].write_bytes(paths[0].read_bytes()[:-300])
    paths[1].unlink()
    cv2.imwrite(str(paths[2]), np.zeros((8, 8, 3), np.uint8))
    broken = sorted(sound.image_ids.index(int(path.stem)) for path in paths)
    assert broken == [2, 3, 10]
    for config in (NO_JOIN, AugmentConfig(mixup_probability=0.5)):
        dataset = _dataset(large_root, config)
        sampler = GlobalBatchSampler(len(dataset), global_batch=11, rank=0, world_size=1, seed=1)
        dataset.set_epoch(0, joins=True)
        assert not dataset.unreadable.any()
        (batch,) = _loader(dataset, sampler, num_workers)
        assert dataset.unreadable.nonzero().flatten().tolist() == broken
        assert sorted(dataset.unreadable_paths(dataset.unreadable)) == sorted(paths)
        reference = _dataset(large_root, config)
        _assert_equal(batch, collate([reference[index] for index in next(iter(sampler))]))
        if config is NO_JOIN:
            order = next(iter(sampler))
            _assert_equal(batch, collate([expected[index] for index in order]))
        dataset.set_epoch(1, joins=True)
        assert not dataset.unreadable.any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(large_root: Path, num_workers: int) -> None:
    path = large_root / "images/train/25.png"
    path.write_bytes(b"")
    dataset = _dataset(large_root, AugmentConfig())
    sampler = GlobalBatchSampler(len(dataset), global_batch=11, rank=0, world_size=1, seed=1)
    batches: Any = iter(_loader(dataset, sampler, num_workers))
    with pytest.raises(TooManyUnreadable, match=r"1 of 11 .* more than 0\.1%: \S*25\.png\. Replace these files and"):
        next(batches)
    if num_workers:
        # Found by the garbage collector, with the error, their end would take 5 s.
        batches._shutdown_workers()


def test_a_thousandth_of_a_split_may_be_unreadable(tmp_path: Path) -> None:
    images = [
        {"id": n, "file_name": f"{n}.jpg", "width": 8, "height": 8, "ignore_regions_xywh": []} for n in range(2000)
    ]
    (tmp_path / "annotations").mkdir()
    content = {"images": images, "annotations": [], "categories": []}
    (tmp_path / "annotations/train.json").write_text(json.dumps(content))
    dataset = _dataset(tmp_path, AugmentConfig())
    unreadable = torch.zeros(2000, dtype=torch.bool)
    assert dataset.unreadable_paths(unreadable) == []
    unreadable[5] = unreadable[1999] = True
    assert dataset.unreadable_paths(unreadable) == [tmp_path / "images/5.jpg", tmp_path / "images/1999.jpg"]
    unreadable[7:30] = True
    with pytest.raises(TooManyUnreadable, match=r"25 of 2000 .*images/5\.jpg, .*images/7\.jpg, .*, \.\.\.\. Replace"):
        dataset.unreadable_paths(unreadable)
    # All of them gone: no endless search for one that can be read.
    with pytest.raises(TooManyUnreadable, match="3 of 2000"):
        dataset[0]


def test_missing_split_and_index(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"split 'dev' is missing"):
        DetectionDataset(root, "dev", input_size_px=60, augment=None, seed=0)
    with pytest.raises(IndexError, match=r"must be in 0\.\.1"):
        _dataset(root)[2]

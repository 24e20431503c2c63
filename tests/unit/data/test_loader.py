from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.decode import UndecodableImage
from data.loader import AugmentConfig, Batch, DetectionDataset, GlobalBatchSampler, Sample, collate, init_worker
from data.prepare import prepare

Make = Callable[..., Path]
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_loader_processes(large_root: Path, num_workers: int) -> None:
    """Two epochs through persistent workers equal samples drawn one by one in this process."""
    dataset = _dataset(large_root, AugmentConfig())
    sampler = GlobalBatchSampler(len(dataset), global_batch=4, rank=0, world_size=1, seed=1)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=init_worker if num_workers else None,
    )
    reference = _dataset(large_root, AugmentConfig(), cache_bytes=0)
    seen = []
    for epoch, uses_mosaic in ((0, True), (1, True), (1, False)):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch, joins=uses_mosaic)
        reference.set_epoch(epoch, joins=uses_mosaic)
        batches = list(loader)
        assert len(batches) == 2
        for batch, indices in zip(batches, sampler, strict=True):
            _assert_equal(batch, collate([reference[index] for index in indices]))
        seen.append(torch.cat([batch.images for batch in batches]))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


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


@pytest.mark.parametrize("cache_bytes", [0, 10_000, 2**20])
def test_cached_pictures_are_the_same_and_within_their_limit(large_root: Path, cache_bytes: int) -> None:
    reference, dataset = _dataset(large_root), _dataset(large_root, cache_bytes=cache_bytes)
    for index in (*range(len(dataset)), 0, 3, 3, 0):
        _assert_equal(dataset[index], reference[index])
        kept = dataset._cache._images.values()
        assert sum(image.nbytes for image in kept) == dataset._cache._num_bytes <= cache_bytes
    assert (len(dataset._cache._images) == len(dataset)) == (cache_bytes == 2**20)


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


def test_missing_split_and_index(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"split 'dev' is missing"):
        DetectionDataset(root, "dev", input_size_px=60, augment=None, seed=0)
    with pytest.raises(IndexError, match=r"must be in 0\.\.1"):
        _dataset(root)[2]

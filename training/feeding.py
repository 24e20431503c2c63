"""From a prepared dataset to batches on the device, and which of them are this worker's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.batch import Batch, collate
from data.loader import DetectionDataset, init_worker
from data.sampler import GlobalBatchSampler
from models.interface import Targets
from training.spec import RunSpec
from training.workers import Workers


def training_data(
    spec: RunSpec, folder: Path, workers: Workers, cache_folder: Path | None
) -> tuple[DetectionDataset, GlobalBatchSampler, DataLoader[Any]]:
    """The training split as this worker sees it. Raises ValueError if it is smaller than one global batch."""
    training, compute = spec.training, spec.compute
    dataset = DetectionDataset(
        folder,
        "train",
        input_size_px=training.input_size_px,
        augment=training.augment,
        seed=spec.seed,
        repeat_threshold=training.repeat_threshold,
        cache_bytes=int(compute.cache_gib * 2**30),
        cache_folder=cache_folder,
    )
    sampler = GlobalBatchSampler(
        len(dataset),
        global_batch=training.batch_size,
        rank=workers.rank,
        world_size=workers.world_size,
        seed=spec.seed,
        repeat_factors=dataset.repeat_factors,
    )
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=compute.loader_processes,
        # Each process knows which cached pictures it has compared with their checksums.
        persistent_workers=compute.loader_processes > 0,
        worker_init_fn=init_worker,
        pin_memory=workers.device.type == "cuda",
    )
    return dataset, sampler, loader


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Targets]:
    """Images in channels-last memory order and the targets of a batch, on `device`."""
    images = batch.images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    targets = Targets(
        boxes_xyxy_px=batch.boxes_xyxy_px.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        image_index=batch.image_index.to(device, non_blocking=True),
        ignore_xyxy_px=batch.ignore_xyxy_px.to(device, non_blocking=True),
        ignore_image_index=batch.ignore_image_index.to(device, non_blocking=True),
    )
    return images, targets


def count_unreadable(dataset: DetectionDataset, workers: Workers) -> list[Path]:
    """Files that any rank could not read in this epoch, on all ranks. Raises TooManyUnreadable."""
    num_ranks = workers.sum(dataset.unreadable.to(workers.device, torch.int32))
    return dataset.unreadable_paths(num_ranks > 0)

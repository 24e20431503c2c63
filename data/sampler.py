"""`GlobalBatchSampler`: which images form step k, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields this rank's share of every global batch, as a `batch_sampler` for a DataLoader.

    The epoch's order is a permutation drawn from (seed, epoch); step k takes its k-th run of `global_batch` images,
    and rank r of W the contiguous part [B r / W, B (r+1) / W) of that run, so shares differ by at most one image.
    The last, incomplete run is left out: `num_dropped` images an epoch, others each time.

    Raises:
        ValueError: the batch exceeds the dataset, is smaller than the world, or the rank is outside it.
    """

    def __init__(self, num_images: int, *, global_batch: int, rank: int, world_size: int, seed: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must be in 0..{world_size - 1}")
        if global_batch < world_size:
            raise ValueError(f"a global batch of {global_batch} leaves some of {world_size} workers without an image")
        if global_batch > num_images:
            raise ValueError(f"a global batch of {global_batch} needs as many images, the split has {num_images}")
        self.num_images = num_images
        self.global_batch = global_batch
        self.seed = seed
        self.num_dropped = num_images % global_batch
        self._share = slice(global_batch * rank // world_size, global_batch * (rank + 1) // world_size)
        self._epoch = 0
        self._first_step = 0

    def set_epoch(self, epoch: int, *, first_step: int = 0) -> None:
        """Choose the epoch's permutation; the next pass begins at `first_step` to resume within an epoch."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_images // self.global_batch - self._first_step

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self._epoch)).permutation(self.num_images)
        for step in range(self._first_step, self.num_images // self.global_batch):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            yield batch[self._share].tolist()

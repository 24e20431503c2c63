"""Which images form batch k, whatever the number of workers: when training, and when scoring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields this rank's share of every global batch, as a `batch_sampler` for a DataLoader.

    The epoch's order is drawn from (seed, epoch) alone: a permutation, in which image i occurs `repeat_factors[i]`
    times on average where factors are given, its k-th repetition as index `i + k * num_images`. Step k takes the k-th
    run of `global_batch` indices, and rank r of W the contiguous part [B r / W, B (r+1) / W) of that run, so shares
    differ by at most one image. So (epoch, step) is all there is to remember for resuming, with any number of ranks.
    The last, incomplete run is left out: `num_dropped` indices an epoch, others each time.

    Raises:
        ValueError: the batch exceeds the dataset, is smaller than the world, or the rank is outside it.
    """

    def __init__(
        self,
        num_images: int,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        repeat_factors: npt.NDArray[np.float64] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must be in 0..{world_size - 1}")
        if global_batch < world_size:
            raise ValueError(f"a global batch of {global_batch} leaves some of {world_size} workers without an image")
        if global_batch > num_images:
            raise ValueError(f"a global batch of {global_batch} needs as many images, the split has {num_images}")
        self.num_images = num_images
        # Multiples of 2^-20: their sums are exact in any order.
        self.repeat_factors = None if repeat_factors is None else np.round(repeat_factors * 2**20) / 2**20
        self.global_batch = global_batch
        self.seed = seed
        # The same in every epoch, for the learning rate's schedule counts steps.
        self.num_drawn = num_images if self.repeat_factors is None else int(self.repeat_factors.sum())
        self.num_dropped = self.num_drawn % global_batch
        self.steps_per_epoch = self.num_drawn // global_batch
        self._share = slice(global_batch * rank // world_size, global_batch * (rank + 1) // world_size)
        self._epoch = 0
        self._first_step = 0

    def set_epoch(self, epoch: int, *, first_step: int = 0) -> None:
        """Choose the epoch's order; the next pass begins at `first_step` to resume within an epoch."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps_per_epoch - self._first_step

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for step in range(self._first_step, self.steps_per_epoch):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            yield batch[self._share].tolist()

    def _order(self) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self._epoch))
        order = rng.permutation(self.num_images)
        if self.repeat_factors is None:
            return order
        # Systematic sampling: a factor of 2.3 gives 2 or 3 occurrences, 2.3 on average, and the sum hardly varies.
        ends = np.floor(np.cumsum(self.repeat_factors[order]) + rng.random()).astype(np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        repetition = np.arange(ends[-1]) - np.repeat(starts, ends - starts)
        repeated = np.repeat(order, ends - starts) + self.num_images * repetition
        rng.shuffle(repeated)
        drawn: npt.NDArray[np.int64] = repeated[: self.num_drawn]
        return drawn


def scoring_batches(num_images: int, *, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's batches of image indices, as a `batch_sampler` for a DataLoader.

    The split is cut, in its own order, into batches of `batch_size`, the last of which may be smaller, and rank r of W
    takes a contiguous run of whole batches. So every batch has the same members for any W, and what a network makes of
    it is the same to the last bit. Shares differ by at most one batch; ranks beyond the number of batches get none.
    """
    num_batches = -(-num_images // batch_size)
    first, end = (num_batches * part // world_size for part in (rank, rank + 1))
    return [
        list(range(number * batch_size, min((number + 1) * batch_size, num_images))) for number in range(first, end)
    ]


def repeat_factors(labels: Sequence[Iterable[int]], num_classes: int, threshold: float) -> npt.NDArray[np.float64]:
    """Return how often each image is to be seen in an epoch (N,), at least once; `labels` of its objects by image.

    Source: Gupta et al. 2019 (LVIS), section 4: max(1, sqrt(t / f)) of a class that is in a share f of all images, and
    of an image the largest of its classes'.
    """
    present = np.zeros((len(labels), num_classes), np.bool_)
    for row, image_labels in zip(present, labels, strict=True):
        row[list(image_labels)] = True
    share = np.maximum(present.sum(axis=0), 1) / max(len(labels), 1)
    by_class = np.maximum(1.0, np.sqrt(threshold / share))
    factors: npt.NDArray[np.float64] = np.where(present, by_class, 1.0).max(axis=1, initial=1.0)
    return factors
